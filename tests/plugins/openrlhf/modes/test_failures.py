"""A run in which nothing can be scored ends, soon and with gymlink's own error as the reason."""

from __future__ import annotations

from typing import Any

import pytest

from gym_rows import flaky

pytestmark = [pytest.mark.slow, pytest.mark.gym]

HOPELESS = [flaky(number, 1) for number in range(8)]


def test_an_asynchronous_trainer_in_which_everything_fails_ends(run_openrlhf: Any) -> None:
    run = run_openrlhf("--train.async_enable", "--algo.advantage.estimator=group_norm", rows=HOPELESS)
    assert run.status != 0
    assert run.left == ()
    assert run.error is not None, run.said[-5000:]
    assert run.error.startswith("RolloutError: No training rollout could be scored."), run.error
    assert "this session fails, as its row asks" in run.error
    assert "RolloutError: No training rollout could be scored." in run.said
    assert {rollout["status"] for rollout in run.rollouts} <= {"failed"}
    assert run.rows == []
