"""What people can rely on is described: every hook with its arguments, every setting by its name."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from gymlink import hookspecs
from gymlink.config import Settings

HOOKS = [hook for hook in vars(hookspecs).values() if inspect.isfunction(hook) and hasattr(hook, "gymlink_spec")]


def test_there_are_hooks() -> None:
    assert hookspecs.gymlink_frameworks in HOOKS


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_every_hook_is_described_with_its_exact_arguments(repository: Path, hook: object) -> None:
    assert inspect.isfunction(hook)
    call = f"`{hook.__name__}({', '.join(inspect.signature(hook).parameters)})`"
    assert call in (repository / "docs" / "plugins.md").read_text(encoding="utf-8")


def test_only_hooks_that_exist_are_described(repository: Path) -> None:
    described = re.findall(r"`(gymlink_\w+)\(", (repository / "docs" / "plugins.md").read_text(encoding="utf-8"))
    assert set(described) == {hook.__name__ for hook in HOOKS}


@pytest.mark.parametrize("section", list(Settings.model_fields))
def test_every_setting_is_described(repository: Path, section: str) -> None:
    page = (repository / "docs" / "settings.md").read_text(encoding="utf-8")
    assert f"\n## {section}\n" in page
    model = Settings.model_fields[section].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    missing = [key for key in model.model_fields if not re.search(rf"`{key}\b|^ +{key}:", page, re.MULTILINE)]
    assert not missing


@pytest.mark.parametrize("framework", ["trl", "verl", "openrlhf"])
def test_every_trainer_is_introduced(repository: Path, framework: str) -> None:
    for page in ("README.md", "docs/README.md"):
        assert f"{framework}.md)" in (repository / page).read_text(encoding="utf-8")
    assert f"gymlink[{framework}]" in (repository / "README.md").read_text(encoding="utf-8")


def test_names_of_the_plugins_on_the_pages_exist(repository: Path, page: Path) -> None:
    """Read from the source: a plugin for a trainer that is not installed cannot be imported."""
    for package, module, name in NAMED.findall(page.read_text(encoding="utf-8")):
        path = repository / "plugins" / package.removeprefix("gymlink_") / package / f"{module}.py"
        assert path.is_file(), f"{package}.{module}"
        defined = {getattr(node, "name", None) for node in ast.parse(path.read_text(encoding="utf-8")).body}
        assert not name or name in defined, f"{package}.{module}.{name}"


NAMED = re.compile(r"\b(gymlink_(?:ray|trl|verl|openrlhf))\.(\w+)(?:\.(\w+))?")
