"""What the pages and the examples say to verl is true: verl's configuration takes it, and the example trains."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

from gymlink import runfile
from gymlink_verl.register import GROUP
from gymlink_verl.train import OWN, compose, overrides_of
from pages import BLOCKS, REPOSITORY, Block

EXAMPLES = REPOSITORY / "examples" / "verl"
PAGE = REPOSITORY / "docs" / "verl.md"
COMMAND = ["python", "-m", "verl.trainer.main_ppo"]
LAUNCHES = [words[3:] for block in BLOCKS for words in block.commands if words[:3] == COMMAND]
RUN_FILES = [block for block in BLOCKS if block.page == PAGE and block.text.startswith("# run.yaml")]


def test_there_are_examples() -> None:
    assert len(LAUNCHES) >= 3
    assert len(RUN_FILES) == 1


@pytest.mark.parametrize("arguments", LAUNCHES, ids=" ".join)
def test_verl_takes_a_launch_command(arguments: Sequence[str]) -> None:
    config = compose([word for word in arguments if "=" in word])
    assert config.gymlink.gym_config == "gym.yaml"


@pytest.mark.parametrize("block", RUN_FILES, ids=str)
def test_verl_takes_the_run_file_of_the_page(block: Block) -> None:
    values = yaml.safe_load(block.text)
    assert set(OWN) <= set(values)
    config = compose(overrides_of(values))
    assert config.actor_rollout_ref.model.path == values["model_name_or_path"]
    assert config.ray_kwargs.ray_init.address == "local"


@pytest.mark.parametrize("key", [*OWN, *(f"gymlink.{key}" for key in GROUP["gymlink"])])
def test_every_setting_of_gymlinks_is_on_the_page(key: str) -> None:
    assert re.search(rf"`{key}`|^{key}:", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_key_that_the_flag_sets_is_on_the_page_and_no_other() -> None:
    table = re.findall(
        r"^\| `([\w.]+)` \|", PAGE.read_text(encoding="utf-8").split("What of it you may replace")[0], re.M
    )
    assert set(table) == {key for key in changed() if not key.startswith("gymlink.")}


def changed() -> set[str]:
    """What the flag sets, at the depth at which the page tells it."""
    leaves = set(keys_of({name: node for name, node in GROUP.items() if name != "gymlink"}))
    return {re.sub(r"\.(custom_cls|custom_sampler|sampler_kwargs)\..*", r".\1", key) for key in leaves}


def keys_of(node: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from keys_of(value, f"{before}{name}.")
        else:
            yield before + name


def test_the_launch_command_is_the_run_file(tmp_path: Path) -> None:
    shown = tmp_path / "python"
    shown.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    shown.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run(
        ["bash", EXAMPLES / "train.sh", "+more=1"], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [*said[:2], said[-1]] == [*COMMAND[1:], "+more=1"]
    values = runfile.resolve_paths(runfile.read_run_file(EXAMPLES / "run.yaml"), EXAMPLES, ())
    values["model_name_or_path"] = str(EXAMPLES / values["model_name_or_path"])
    assert resolved(said[2:-1]) == resolved(overrides_of(values))


def resolved(overrides: Sequence[str]) -> Any:
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(compose(overrides))
    return json.loads(json.dumps(config), object_hook=without_dots)


def without_dots(node: dict[str, Any]) -> dict[str, Any]:
    return {key: os.path.normpath(value) if str(value).startswith("/") else value for key, value in node.items()}


@pytest.mark.slow
@pytest.mark.gym
def test_the_example_trains_as_its_page_says(tmp_path: Path) -> None:
    """In a copy, since the run file's paths lead to `runs/` of the checkout."""
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    [commands] = [block.commands for block in BLOCKS if block.page == EXAMPLES / "README.md" and "export" in block.text]
    [make_model, _, train] = commands
    with TemporaryDirectory(prefix="r-", dir="/tmp") as ray_folder:  # Ray's sockets need a short name
        environment = {
            **os.environ,
            "RAY_TMPDIR": ray_folder,
            "PYTHONPATH": str(REPOSITORY / "tests" / "verl_on_cpu"),
            "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",
        }
        run(["-m", *make_model[2:]], tmp_path, environment)
        few = ["trainer.total_training_steps=2", "trainer.test_freq=2"]
        said = run(["-m", *train, *few], tmp_path, environment)
    assert len(re.findall(r"rollout/reward_mean:", said)) == 2, said[-4000:]
    assert "val-core/keypad_agent/reward/mean@1" in said
    folder = tmp_path / "runs" / "verl" / "gym"
    rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_bytes().splitlines()]
    assert len(rollouts) == 2 * 4 * 8 + 16
    assert all(rollout["status"] != "failed" and rollout["turns"] == 2 for rollout in rollouts)
    assert {path.name for path in folder.iterdir()} == {"rollouts.jsonl", "gym.json", "logs"}


def run(arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
