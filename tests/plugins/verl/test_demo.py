"""The demo through the unmodified `verl.trainer.main_ppo` on the CPU, whole, and killed in the middle."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from demo_runs import Demo

pytestmark = [pytest.mark.slow, pytest.mark.gym]

ON_CPU = Path(__file__).resolve().parents[2] / "verl_on_cpu"
Start = Callable[[], Demo]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Start]:
    running: list[Demo] = []

    def start() -> Demo:
        env = {"PYTHONPATH": str(ON_CPU), "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu"}
        arguments = ["+verl_on_cpu=on"]
        running.append(Demo(tmp_path / "out", framework="verl", arguments=arguments, env=env))
        return running[-1]

    yield start
    for one in running:
        one.close()


def test_verl_learns_the_demos_task_with_exact_tokens(demo: Start) -> None:
    run = demo()
    assert run.process.wait(580) == 0, run.text()
    summary = run.checked_summary(40)
    assert summary["framework"] == "verl"
    assert summary["reward_first"] < 0.3
    assert summary["reward_last"] >= 0.9
    assert summary["tokens_dropped"] == 0
    run.assert_nothing_is_left()


def test_a_demo_that_is_killed_while_it_trains_leaves_nothing(demo: Start) -> None:
    run = demo()
    run.wait_for("step 1:")
    assert len(run.alive()) > 20
    run.process.send_signal(signal.SIGKILL)
    run.process.wait(60)
    run.assert_nothing_is_left()
