"""OpenRLHF's own parser of its command line, without what its program imports besides: vLLM, DeepSpeed, Ray."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _Argparse:
    ArgumentParser = _Parser


def parser() -> argparse.ArgumentParser:
    """The parser that the program builds, from the statements that build it (OpenRLHF 0.11.2)."""
    package = find_spec("openrlhf")
    assert package is not None
    assert package.submodule_search_locations is not None
    source = (Path(package.submodule_search_locations[0]) / "cli" / "train_ppo_ray.py").read_text(encoding="utf-8")
    [main] = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    building: list[ast.stmt] = []
    for statement in main.body:
        if "parse_args" in ast.unparse(statement):
            break
        building.append(statement)
    from datetime import datetime

    names: dict[str, Any] = {"argparse": _Argparse, "datetime": datetime}
    exec(compile(ast.Module(building, []), "train_ppo_ray", "exec"), names)
    built: argparse.ArgumentParser = names["parser"]
    return built


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """What OpenRLHF makes of a command line; `ValueError` for one that it refuses."""
    return vars(parser().parse_args(list(arguments)))
