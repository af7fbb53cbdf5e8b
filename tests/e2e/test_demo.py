"""The demo as a person runs it: as a program, finished, interrupted and killed."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from demo_runs import Demo

pytestmark = [pytest.mark.slow, pytest.mark.gym]

Start = Callable[[int], Demo]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Start]:
    running: list[Demo] = []

    def start(steps: int) -> Demo:
        running.append(Demo(tmp_path / "out", steps))
        return running[-1]

    yield start
    for one in running:
        one.close()


def test_a_short_demo_leaves_its_files_and_no_process(demo: Start) -> None:
    run = demo(6)
    assert run.process.wait(400) in (0, 1), run.text()  # six steps need not raise the reward
    run.checked_summary(6)
    run.assert_nothing_is_left()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda sent: sent.name)
def test_a_demo_that_is_ended_while_it_trains_leaves_nothing(demo: Start, sent: signal.Signals) -> None:
    run = demo(200)
    run.wait_for("step 1:")
    assert len(run.alive()) > 5
    run.process.send_signal(sent)
    run.process.wait(60)
    run.assert_nothing_is_left()


def test_a_demo_whose_whole_group_is_killed_while_gym_starts_leaves_nothing(demo: Start) -> None:
    run = demo(200)
    until = time.monotonic() + 120
    while len(run.alive()) < 5:
        assert time.monotonic() < until, run.text()
        time.sleep(0.1)
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait(60)
    run.assert_nothing_is_left()
