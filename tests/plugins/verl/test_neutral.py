"""The rewards of failed rollouts move nothing in the legacy trainer, judged by verl's own estimator."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from gymlink.rollout import neutral_rewards

rewards = st.floats(-10, 10, allow_nan=False, width=32)
groups = st.lists(rewards, min_size=2, max_size=8)


def advantages(scored: list[float], neutral: list[float], *, normalised: bool = True) -> list[float]:
    """One for each row, as verl's GRPO estimator gives it to the row's one response token; failed ones are masked."""
    mask = torch.tensor([[1.0]] * len(scored) + [[0.0]] * len(neutral), dtype=torch.float64)
    given = torch.tensor([[reward] for reward in [*scored, *neutral]], dtype=torch.float64)
    index = np.array(["one prompt"] * len(mask), dtype=object)
    made, _ = compute_grpo_outcome_advantage(given, mask, index, norm_adv_by_std_in_grpo=normalised)
    return [float(row) for row in made.squeeze(-1)]


@settings(deadline=None)
@given(groups, st.integers(2, 6), st.booleans())
@example([0.0, 0.0], 3, True)
def test_with_two_or_more_failures_the_others_learn_as_without_them(
    scored: list[float], failed: int, normalised: bool
) -> None:
    neutral = neutral_rewards(scored, failed)
    assert len(neutral) == failed
    made = advantages(scored, neutral, normalised=normalised)
    assert made[: len(scored)] == pytest.approx(advantages(scored, [], normalised=normalised), abs=1e-5, rel=1e-6)
    assert made[len(scored) :] == [0.0] * failed


@settings(deadline=None)
@given(groups)
def test_with_one_failure_normalised_advantages_grow_by_the_known_factor(scored: list[float]) -> None:
    assume(stdev(scored) > 1e-2)  # verl adds 1e-6 to the deviation
    neutral = neutral_rewards(scored, 1)
    assert neutral == [fmean(scored)]
    assert advantages(scored, neutral, normalised=False)[:-1] == pytest.approx(
        advantages(scored, [], normalised=False), abs=1e-9
    )
    size = len(scored) + 1
    factor = math.sqrt((size - 1) / (size - 2))
    expected = [factor * one for one in advantages(scored, [])]
    assert advantages(scored, neutral)[:-1] == pytest.approx(expected, abs=1e-3)


@settings(deadline=None)
@given(rewards, st.integers(1, 6))
def test_one_scored_rollout_alone_learns_nothing(reward: float, failed: int) -> None:
    """Alone in its group, verl would take its bare reward for its advantage."""
    assert advantages([reward], neutral_rewards([reward], failed)) == pytest.approx([0.0] * (failed + 1), abs=1e-5)
