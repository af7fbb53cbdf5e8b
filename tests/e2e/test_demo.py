"""The demo as a person runs it: as a program, finished, interrupted and killed."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.gym]

MARK = "GYMLINK_TEST_MARK"
"""Environment variable that every process of one demo inherits, whoever its parent is by then."""

SUMMARY_KEYS = {
    "framework", "framework_version", "gym_version", "environment", "steps", "rollouts", "failed", "reward_first",
    "reward_last", "prefix_breaks", "tokens_sampled", "tokens_trained", "tokens_dropped", "max_logprob_error",
    "max_prob_error", "seconds_setup", "seconds_train",
}  # fmt: skip


class Demo:
    """One run of the demo, and all the processes that belong to it."""

    def __init__(self, output: Path, steps: int) -> None:
        self.output = output
        self._mark = uuid.uuid4().hex
        self._log = (output.parent / "demo.log").open("w+")
        command = [sys.executable, "-m", "gymlink", "demo", "--output", str(output), "--steps", str(steps)]
        self.process = subprocess.Popen(
            command, env={**os.environ, MARK: self._mark}, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def text(self) -> str:
        return Path(self._log.name).read_text()

    def wait_for(self, text: str, deadline_s: float = 300) -> None:
        until = time.monotonic() + deadline_s
        while text not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < until, f"{text!r} never came: {self.text()}"
            time.sleep(0.1)

    def alive(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def assert_nothing_is_left(self, deadline_s: float = 30) -> None:
        until = time.monotonic() + deadline_s
        while left := self.alive():
            assert time.monotonic() < until, [process.cmdline()[:4] for process in left if process.is_running()]
            time.sleep(0.2)

    def close(self) -> None:
        for process in self.alive():
            process.kill()
        self.process.wait()
        self._log.close()


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[object]:
    running: list[Demo] = []

    def start(steps: int) -> Demo:
        running.append(Demo(tmp_path / "out", steps))
        return running[-1]

    yield start
    for one in running:
        one.close()


def test_a_short_demo_leaves_its_files_and_no_process(demo) -> None:
    run = demo(6)
    assert run.process.wait(400) in (0, 1), run.text()  # six steps need not raise the reward
    summary = json.loads((run.output / "summary.json").read_text())
    assert set(summary) >= SUMMARY_KEYS
    assert summary["steps"] == 6
    assert summary["failed"] == summary["prefix_breaks"] == 0
    assert summary["max_logprob_error"] <= 1e-4
    assert summary["tokens_trained"] + summary["tokens_dropped"] == summary["tokens_sampled"] > 0
    steps = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    rollouts = [json.loads(line) for line in (run.output / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == summary["rollouts"]
    assert sum(rollout["tokens_sampled"] for rollout in rollouts) == summary["tokens_sampled"]
    assert (run.output / "reward.png").stat().st_size > 0
    run.assert_nothing_is_left()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda sent: sent.name)
def test_a_demo_that_is_ended_while_it_trains_leaves_nothing(demo, sent: signal.Signals) -> None:
    run = demo(200)
    run.wait_for("step 1:")
    assert len(run.alive()) > 5
    run.process.send_signal(sent)
    run.process.wait(60)
    run.assert_nothing_is_left()


def test_a_demo_whose_whole_group_is_killed_while_gym_starts_leaves_nothing(demo) -> None:
    run = demo(200)
    until = time.monotonic() + 120
    while len(run.alive()) < 5:
        assert time.monotonic() < until, run.text()
        time.sleep(0.1)
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait(60)
    run.assert_nothing_is_left()
