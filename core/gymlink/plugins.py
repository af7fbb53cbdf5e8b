"""Finds plugins and loads them one by one: a broken plugin is reported and never breaks another."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import pluggy
from packaging.specifiers import SpecifierSet

from gymlink import hookspecs
from gymlink.errors import PluginError
from gymlink.hookspecs import Framework

ENTRY_POINT_GROUP = "gymlink"


@dataclass(frozen=True, slots=True)
class Plugins:
    """What was found: frameworks by name, and the failure of each plugin that could not be loaded."""

    frameworks: dict[str, Framework]
    failures: dict[str, str]


@lru_cache(maxsize=1)
def load_plugins() -> Plugins:
    """Load every installed plugin. No trainer is imported."""
    frameworks: dict[str, Framework] = {}
    failures: dict[str, str] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            frameworks |= _frameworks_of(entry.load(), taken=frameworks.keys())
        except Exception as error:  # noqa: BLE001 - a stranger's plugin may raise anything; the others must still load
            failures[entry.name] = f"{type(error).__name__}: {error}"
    return Plugins(frameworks=frameworks, failures=failures)


def _frameworks_of(plugin: object, *, taken: Collection[str]) -> dict[str, Framework]:
    """What one plugin names; a manager of its own keeps its failures its own."""
    manager = pluggy.PluginManager("gymlink")
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    manager.check_pending()
    found = {framework.name: framework for listed in manager.hook.gymlink_frameworks() for framework in listed}
    if twice := sorted(found.keys() & set(taken)):
        raise PluginError(f"another plugin already connects {twice[0]!r}")
    return found


def find_framework(name: str) -> Framework:
    """The framework of that name, installed in a version that its plugin supports.

    Raises:
        PluginError: unknown name, framework not installed, or a version outside the supported range.
    """
    plugins = load_plugins()
    framework = plugins.frameworks.get(name)
    if framework is None:
        known = ", ".join(sorted(plugins.frameworks)) or "none"
        broken = "".join(f" The plugin {key!r} could not be loaded: {why}." for key, why in plugins.failures.items())
        raise PluginError(f"No framework is called {name!r}; known: {known}.{broken}")
    install = f"pip install 'gymlink[{framework.extra}]'"
    try:
        installed = version(framework.distribution)
    except PackageNotFoundError as error:
        raise PluginError(f"{framework.distribution} is not installed: {install}") from error
    if not SpecifierSet(framework.versions).contains(installed, prereleases=True):
        raise PluginError(
            f"{framework.distribution} {installed} is installed, and gymlink works with {framework.versions}: {install}"
        )
    return framework


def resolve(path: str) -> Callable[..., Any]:
    """Import what "package.module:name" names."""
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
