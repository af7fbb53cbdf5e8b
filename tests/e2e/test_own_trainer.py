"""A trainer without a plugin: the example on its page trains a model through `gymlink serve`, as it stands there.

Everything is real but the model's size: the program, NeMo Gym, the engine on a transformers model, plain torch.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from gymlink.client import GatewayClient
from gymlink.gym import read_rows
from gymlink.types import RolloutStatus, Sampling, Segment
from gymlink_tiny import make_model, make_tokenizer, save_tiny
from gymlink_transformers.logprobs import SampledRow, max_logprob_error
from pages import blocks_of
from processes import MARK, marked

pytestmark = [pytest.mark.slow, pytest.mark.gym]

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "own_trainer"
ROWS = REPOSITORY / "examples" / "environments" / "resources_servers" / "keypad" / "data" / "train.jsonl"
PAGE = REPOSITORY / "docs" / "own-trainer.md"
STEPS = 25
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Two programs that take turns on a tiny model would else wait for each other's threads."""
LINE = re.compile(r"^step \d+: reward ([\d.]+), weights (\d+)$", re.MULTILINE)


@contextmanager
def serve(folder: Path, *options: str) -> Iterator[Mapping[str, Any]]:
    """`gymlink serve` as a program; nothing of it is left afterwards."""
    mark = uuid.uuid4().hex
    log = folder / "serve.log"
    command = [sys.executable, "-m", "gymlink", "serve", "--json", "--run-dir", str(folder / "run"), *options]
    with log.open("w") as said:
        program = subprocess.Popen(
            command, env={**os.environ, **ONE_THREAD, MARK: mark}, stdout=subprocess.PIPE, stderr=said
        )
        try:
            assert program.stdout is not None
            line = program.stdout.readline()
            assert line, log.read_text()
            yield json.loads(line)
        finally:
            program.send_signal(signal.SIGINT)
            try:
                program.wait(60)
            finally:
                for left in marked(mark):
                    left.kill()
                program.wait()
                assert program.stdout is not None
                program.stdout.close()
    assert program.returncode == 0, log.read_text()
    assert not marked(mark)


def test_the_example_trains_as_it_is(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    options = ("--engine", "transformers", "--model", str(model), "--config", str(EXAMPLE / "gym.yaml"))
    with serve(tmp_path, *options, "--max-tokens", "8") as running:
        where = ("--url", running["url"], "--api-key", running["api_key"])
        what = ("--model", str(model), "--rows", str(ROWS), "--steps", str(STEPS))
        done = subprocess.run(
            [sys.executable, str(EXAMPLE / "train.py"), *where, *what],
            cwd=tmp_path,
            env={**os.environ, **ONE_THREAD},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        check_agreement(running, tmp_path / "runs" / "own_trainer")
    steps = LINE.findall(done.stdout)
    assert [int(version) for _, version in steps] == list(range(1, STEPS + 1))
    rewards = [float(reward) for reward, _ in steps]
    assert fmean(rewards[:3]) < 0.3
    assert fmean(rewards[-3:]) > 0.6, rewards
    lines = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_bytes().splitlines()]
    assert len(lines) == STEPS * 32 + 4
    assert not any(line["failure"] for line in lines)
    assert all(not line["prefix_breaks"] for line in lines)


def check_agreement(running: Mapping[str, Any], weights: Path) -> None:
    """What is collected now was sampled from the weights that were saved last, token by token."""
    from transformers import AutoModelForCausalLM

    rows = list(read_rows(ROWS))[:2]
    with GatewayClient(running["url"], running["api_key"]) as gateway:
        version = gateway.load_weights(str(weights))
        collected = gateway.collect(rows, samples=2)
        status = gateway.status()
    assert (status.weight_version, status.open_rollouts, status.in_flight) == (version, 0, 0)
    assert [len(group) for group in collected.groups] == [2, 2]
    segments = [segment for rollout in collected.rollouts for segment in rollout.segments]
    assert not any(rollout.status is RolloutStatus.FAILED for rollout in collected.rollouts)
    assert {turn.weight_version for rollout in collected.rollouts for turn in rollout.turns} == {version}
    assert 0 < error_of(AutoModelForCausalLM.from_pretrained(weights), segments) < 1e-4


def error_of(model: Any, segments: Sequence[Segment]) -> float:
    rows = [SampledRow(one.prompt_ids, one.response_ids, one.response_logprobs, one.response_mask) for one in segments]
    return max_logprob_error(model, rows, Sampling())


def test_the_session_on_the_page_collects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (block for block in blocks_of(PAGE) if "from gymlink.session import Session" in block.text)
    on_the_page: dict[str, Any] = {}
    exec(compile(block.text, str(block), "exec"), on_the_page)
    settings = (EXAMPLE / "gym.yaml").read_text(encoding="utf-8").replace("../", f"{EXAMPLE.parent}/")
    (tmp_path / "gym.yaml").write_text(settings, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    rows = list(read_rows(ROWS))[:3]
    rollouts = on_the_page["collect"](model, tokenizer, rows, version=4)
    assert [rollout.failure for rollout in rollouts] == [None, None, None]
    assert {turn.weight_version for rollout in rollouts for turn in rollout.turns} == {4}
    assert error_of(model, [segment for rollout in rollouts for segment in rollout.segments]) < 1e-4


def test_the_page_holds_the_example_word_for_word() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert f"```python\n{(EXAMPLE / 'train.py').read_text(encoding='utf-8')}```\n" in page
