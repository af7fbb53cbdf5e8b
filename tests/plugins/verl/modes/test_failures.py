"""A run in which nothing can be scored ends, soon and with gymlink's own error as the reason."""

from __future__ import annotations

from typing import Any

import pytest

from gym_rows import flaky
from verl_runs import Run

pytestmark = [pytest.mark.slow, pytest.mark.gym]

HOPELESS = [flaky(number, 1) for number in range(8)]
WHY = "this session fails, as its row asks"


def assert_ended(run: Run, because: str) -> None:
    assert run.status != 0
    assert run.left == ()
    assert run.error is not None, run.said[-5000:]
    assert run.error.startswith(f"RolloutError: {because}"), run.error
    assert WHY in run.error
    assert f"RolloutError: {because}" in run.said
    for noise in ("KeyError", "ValueError", "AssertionError"):
        assert noise not in run.said
    assert {rollout["status"] for rollout in run.rollouts} == {"failed"}
    assert run.rows == []


def test_a_validation_in_which_everything_fails_ends_the_run(run_verl: Any) -> None:
    run = run_verl("trainer.val_before_train=True", val_rows=HOPELESS[:2])
    assert_ended(run, "No validation rollout of this batch could be used. 2 of 2 rollouts failed")


def test_an_asynchronous_trainer_does_not_replace_failed_groups_for_ever(run_verl: Any) -> None:
    run = run_verl("trainer.v1.trainer_mode=colocate_async", rows=HOPELESS)
    assert_ended(run, "Too many rollouts failed, more than rollout.max_failed_fraction = 0.5 allows.")
