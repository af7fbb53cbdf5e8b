"""What the pages and the examples say to OpenRLHF is true: its own parser takes it, and the two examples are one run.

That such a run trains is shown by the demo, which is made of the same parts.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from gymlink import runfile
from gymlink_openrlhf.train import OWN, Run
from openrlhf_flags import parsed
from pages import BLOCKS, REPOSITORY, Block

EXAMPLES = REPOSITORY / "examples" / "openrlhf"
PAGE = REPOSITORY / "docs" / "openrlhf.md"
COMMAND = ["python", "-m", "openrlhf.cli.train_ppo_ray"]
TRAIN = ["gymlink", "train", "openrlhf"]
RUN_FILES = [block for block in BLOCKS if block.page == PAGE and block.text.startswith("# run.yaml")]
LAUNCHES = [words[3:] for block in BLOCKS for words in block.commands if words[:3] == COMMAND]
AFTER_DASHES = [
    words[words.index("--") + 1 :]
    for block in BLOCKS
    for words in block.commands
    if words[:3] == TRAIN and "--" in words
]


def test_there_are_examples() -> None:
    assert LAUNCHES
    assert RUN_FILES
    assert len(AFTER_DASHES) >= 2


@pytest.mark.parametrize("arguments", LAUNCHES, ids=" ".join)
def test_openrlhf_takes_a_launch_command(arguments: Sequence[str]) -> None:
    flags = parsed(arguments)
    assert flags["train.agent_func_path"]
    assert (flags["data.input_key"], flags["data.label_key"]) == ("input", "label")


@pytest.mark.parametrize("arguments", AFTER_DASHES, ids=" ".join)
def test_openrlhf_takes_what_follows_a_run_file(arguments: Sequence[str]) -> None:
    parsed([word for word in arguments if not word.startswith("[")])


@pytest.mark.parametrize("block", RUN_FILES, ids=str)
def test_openrlhf_takes_the_run_file_of_the_page(block: Block) -> None:
    values = yaml.safe_load(block.text)
    flags = parsed(Run.of(values, []).arguments)
    assert flags["actor.model_name_or_path"] == values["model_name_or_path"]


@pytest.mark.parametrize("key", OWN)
def test_every_key_of_gymlinks_is_on_the_page(key: str) -> None:
    assert re.search(rf"`{key}`|^{key}:", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_launch_command_is_the_run_file(tmp_path: Path) -> None:
    """In a copy, since what the command writes goes to `runs/` of the checkout."""
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    examples = tmp_path / "examples" / "openrlhf"
    commands = tmp_path / "bin"
    commands.mkdir()
    program(commands / "python", 'printf "%s\\n" "$@"')
    program(commands / "gymlink", f'exec {sys.executable} -W ignore -m gymlink "$@"')
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}
    said = subprocess.run(
        ["bash", examples / "train.sh", "--train.seed", "7"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert said[:2] == COMMAND[1:]
    assert said[-2:] == ["--train.seed", "7"]
    launched = parsed(said[2:])
    for flag in ("train.agent_func_path", "data.prompt_dataset", "eval.dataset"):
        assert Path(launched[flag]).is_file()

    values = runfile.resolve_paths(runfile.read_run_file(examples / "run.yaml"), examples, ())
    values["model_name_or_path"] = str(examples / values["model_name_or_path"])
    assert without_dots(launched) == without_dots(parsed(Run.of(values, ["--train.seed", "7"]).arguments))


def program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def without_dots(flags: dict[str, Any]) -> dict[str, Any]:
    return {key: os.path.normpath(value) if str(value).startswith("/") else value for key, value in flags.items()}
