"""The examples run as they are: by the command line and by the script, two steps each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gymlink_tiny import main

pytestmark = [pytest.mark.slow, pytest.mark.gym]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "trl"


def run(*command: str) -> str:
    """What the program said, on both streams together."""
    done = subprocess.run(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def assert_two_steps(said: str, output: Path) -> None:
    """Each step's reward is in TRL's log; every rollout, of training and of evaluation, was scored and written down."""
    assert len(re.findall(r"'reward': ", said)) == 2, said[-4000:]
    rollouts = [json.loads(line) for line in (output / "gym" / "rollouts.jsonl").read_bytes().splitlines()]
    assert len(rollouts) >= 2 * 32
    assert all(rollout["status"] != "failed" and rollout["turns"] == 2 for rollout in rollouts)
    assert all(0.0 <= rollout["reward"] <= 1.0 for rollout in rollouts)
    assert "rollouts failed" not in said
    assert (output / "model.safetensors").is_file()


def test_the_command_line(tmp_path: Path) -> None:
    model, output = tmp_path / "tiny", tmp_path / "out"
    main([str(model)])
    config = ("--config", str(EXAMPLES / "run.yaml"), "--model_name_or_path", str(model))
    said = run("-m", "gymlink", "train", "trl", *config, "--max_steps", "2", "--output_dir", str(output))
    assert_two_steps(said, output)
    assert "FutureWarning" not in said


def test_the_script(tmp_path: Path) -> None:
    said = run(str(EXAMPLES / "train.py"), "--max_steps", "2", "--output_dir", str(tmp_path))
    assert_two_steps(said, tmp_path)
    assert "64 rollouts, 0 failed" in said
