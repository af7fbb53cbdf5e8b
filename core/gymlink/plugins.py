"""Finds plugins and loads them one by one: a broken plugin is reported and never breaks another."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any, TypeVar

import pluggy
from packaging.specifiers import SpecifierSet

from gymlink import hookspecs
from gymlink.errors import PluginError
from gymlink.hookspecs import EngineKind, Framework

ENTRY_POINT_GROUP = "gymlink"
T = TypeVar("T", Framework, EngineKind)


@dataclass(frozen=True, slots=True)
class Plugins:
    """What was found: frameworks and engines by name, and the failure of each plugin that could not be loaded."""

    frameworks: dict[str, Framework]
    failures: dict[str, str]
    engines: dict[str, EngineKind] = field(default_factory=dict)


@lru_cache(maxsize=1)
def load_plugins() -> Plugins:
    """Load every installed plugin. No trainer is imported."""
    found = Plugins(frameworks={}, failures={})
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            _add(entry.load(), found)
        except Exception as error:  # noqa: BLE001 - a stranger's plugin may raise anything; the others must still load
            found.failures[entry.name] = f"{type(error).__name__}: {error}"
    return found


def _add(plugin: object, found: Plugins) -> None:
    """Add what one plugin names, all or nothing; a manager of its own keeps its failures its own."""
    manager = pluggy.PluginManager("gymlink")
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    manager.check_pending()
    frameworks = _named(manager.hook.gymlink_frameworks(), taken=found.frameworks)
    engines = _named(manager.hook.gymlink_engines(), taken=found.engines)
    found.frameworks.update(frameworks)
    found.engines.update(engines)


def _named(lists: Iterable[Iterable[T]], *, taken: Collection[str]) -> dict[str, T]:
    named = {one.name: one for listed in lists for one in listed}
    if twice := sorted(named.keys() & set(taken)):
        raise PluginError(f"another plugin already connects {twice[0]!r}")
    return named


def find_framework(name: str) -> Framework:
    """The framework of that name, installed in a version that its plugin supports.

    Raises:
        PluginError: unknown name, framework not installed, or a version outside the supported range.
    """
    framework = _find(load_plugins().frameworks, name, "framework")
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


def find_engine(name: str) -> EngineKind:
    """The kind of engine of that name. Raises `PluginError` for one that is not known."""
    return _find(load_plugins().engines, name, "engine")


def _find(named: Mapping[str, T], name: str, what: str) -> T:
    if name in named:
        return named[name]
    known = ", ".join(sorted(named)) or "none"
    failures = load_plugins().failures
    broken = "".join(f" The plugin {key!r} could not be loaded: {why}." for key, why in failures.items())
    raise PluginError(f"No {what} is called {name!r}; known: {known}.{broken}")


def resolve(path: str) -> Callable[..., Any]:
    """Import what "package.module:name" names."""
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
