"""Every example in the pages is true: it compiles, parses, names what exists."""

from __future__ import annotations

import ast
import importlib
import json
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer
import yaml

from gymlink.config import parse_settings

if TYPE_CHECKING:
    from pages import Block

INLINE_MAKE = re.compile(r"`make ([a-z][a-z-]*)[^`]*`")
LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)(?:#[^)]*)?\)")


def test_every_language_is_one_that_is_checked(languages: set[str]) -> None:
    assert languages == {"python", "yaml", "json", "toml", "console"}


@pytest.mark.filterwarnings("ignore")  # what other people's packages say when they are imported
def test_python_compiles_and_its_imports_resolve(python_block: Block) -> None:
    tree = ast.parse(python_block.text, filename=str(python_block))
    compile(tree, str(python_block), "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_yaml_parses_and_a_gym_yaml_is_accepted(yaml_block: Block) -> None:
    data = yaml.safe_load(yaml_block.text)
    if yaml_block.text.startswith("# gym.yaml"):
        parse_settings(data, where=str(yaml_block))


def test_json_parses(json_block: Block) -> None:
    json.loads(json_block.text)


def test_toml_parses(toml_block: Block) -> None:
    tomllib.loads(toml_block.text)


def test_commands_exist(console_block: Block, repository: Path, make_targets: set[str]) -> None:
    for words in console_block.commands:
        match words:
            case ["gymlink", *arguments]:
                check_command_line(arguments)
            case ["make", *arguments]:
                assert set(targets(arguments)) <= make_targets, words
            case ["python", "-m", "verl.trainer.main_ppo", *arguments]:
                assert "+gymlink=gym" in arguments  # the rest is checked where verl is installed
            case ["python", "-m", "openrlhf.cli.train_ppo_ray", *arguments]:
                assert "--train.agent_func_path" in arguments  # the rest is checked where OpenRLHF is installed
            case ["python", "-m", module, *_]:
                assert find_spec(module), words
            case ["python" | "python3" | "bash", str(script), *_] if not script.startswith("-"):
                assert (repository / script).is_file(), words
            case ["pip", "install", *packages]:
                named = set(re.findall(r"(?:gymlink|\.)\[(\w+)\]", " ".join(packages)))
                assert named <= extras(repository), words


def extras(repository: Path) -> set[str]:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"])


def targets(words: list[str]) -> list[str]:
    return [word for word in words if "=" not in word and not word.startswith("-")]


def check_command_line(arguments: list[str]) -> None:
    """Parse as the program would, without running it; click raises on what it does not know."""
    from gymlink.cli import app

    group = typer.main.get_group(app)
    with group.make_context("gymlink", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        command.make_context(name, rest, parent=context).close()


@pytest.mark.parametrize("line", ["demon", "demo --frame trl", "demo --steps many", "train"])
def test_a_wrong_command_line_is_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|valid|missing"):
        check_command_line(line.split())


def test_make_targets_that_the_text_names_exist(page: Path, make_targets: set[str]) -> None:
    named = set(INLINE_MAKE.findall(page.read_text(encoding="utf-8")))
    assert named <= make_targets


@pytest.mark.parametrize("path", [".github/workflows/ci.yml", ".ci/run", ".pre-commit-config.yaml"])
def test_what_ci_runs_exists(repository: Path, make_targets: set[str], path: str) -> None:
    text = (repository / path).read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake (?:--[a-z-]+ )*([a-z]+(?:-[a-z]+)*)", text))
    scripts = re.findall(r"\bscripts/[\w.]+", text)
    assert named or scripts
    assert named <= make_targets
    assert all((repository / script).is_file() for script in scripts)


def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
