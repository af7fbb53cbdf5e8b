"""What the rollouts of one prompt are worth to OpenRLHF, so that those without a score move none of the others.

OpenRLHF makes advantages from all rewards of a group. The ones without a score get rewards with which its estimators
give the others what they would get among themselves:

    dr_grpo, reinforce_baseline   r - mean(r): the mean of the scored ones keeps the mean.
    group_norm                    (r - mean(r)) / std(r): two or more keep the spread too. One cannot
                                  (`gymlink.rollout.neutral` has the proof): the others grow by sqrt((n-1)/(n-2)).
    rloo                          r - mean of the others: n rewards of which n - m are the mean u of the m scored give
                                  n/(n-1) (r - u), and the m alone m/(m-1) (r - u); so the scored ones are moved away
                                  from their mean by the quotient of the two.
    gae, reinforce                no group: the mean, for want of the value or of the batch's mean.
    flash_reinforce               the batch's mean: likewise.

(`RemoteExperienceMaker.compute_advantages_and_returns`, OpenRLHF 0.11.2.) Length penalties change rewards before that,
and are accounted for with OpenRLHF's own function; only rloo's quotient is left out under
`--reward.stop_properly_penalty_coef`, which multiplies what it is given. In evaluation every reward is told as it is,
and the mean is neutral.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from types import SimpleNamespace

from gymlink.rollout import neutral_rewards
from gymlink.types import DropReason, Rollout
from gymlink_openrlhf.convert import sample_of
from gymlink_openrlhf.options import GROUP_RELATIVE, Options, Penalties

COMPARABLE = 2
"""Scored rollouts that an estimator needs of a group in order to compare."""
KEPT_BITS = 14
"""Of an equal reward: float32 has 24, so it adds up to 1024 of them without an error."""


@dataclass(frozen=True, slots=True)
class GroupRewards:
    """Rewards and scores for the scored rollouts of a group, in their order, and for the others.

    `untrained` is the reason why nothing of the scored ones is learnt, None when it is.
    """

    rewards: Sequence[float]
    scores: Sequence[float]
    others: Sequence[float]
    other_score: float
    untrained: str | None = None


def group_rewards(scored: Sequence[Rollout], others: int, options: Options, *, training: bool) -> GroupRewards:
    """What a group is worth of which `scored` (at least one) have a score and `others` have none."""
    plain = [float(rollout.reward) for rollout in scored if rollout.reward is not None]
    mean = fmean(plain)
    if not training:
        return GroupRewards(plain, plain, [mean] * others, mean)
    if options.estimator in GROUP_RELATIVE and others > 0 and len(scored) < COMPARABLE:
        return GroupRewards(
            [equal(mean)],
            plain,
            [equal(mean)] * others,
            math.nan if options.filtering else mean,
            DropReason.ALONE_IN_GROUP,
        )
    rewards, neutral = _rewards(scored, plain, others, options)
    return GroupRewards(rewards, plain, neutral, mean, _filtered(mean, options))


def equal(reward: float) -> float:
    """A reward for all rollouts of a group, which group_norm makes advantages of 0 from.

    In float32 the mean of equal numbers can be one digit off, and group_norm divides by a spread that is no larger:
    advantages would be near 1. A number of few digits has no such error.
    """
    mantissa, exponent = math.frexp(reward)
    return math.ldexp(round(math.ldexp(mantissa, KEPT_BITS)), exponent - KEPT_BITS)


def _filtered(score: float, options: Options) -> str | None:
    """The test is OpenRLHF's own (`SamplesGenerator._generate_vllm`)."""
    if options.filtering is None or options.filtering[0] < score < options.filtering[1]:
        return None
    return DropReason.FILTERED


def _rewards(
    scored: Sequence[Rollout], plain: Sequence[float], others: int, options: Options
) -> tuple[Sequence[float], Sequence[float]]:
    """The rewards of the scored ones and of the others."""
    if not others:
        return plain, []
    kept = _penalised(scored, plain, options.penalties)
    mean = fmean(kept)
    if options.estimator == "group_norm":
        # What a penalty leaves equal has the digits that float32 gives it: those are left to chance.
        if kept == plain and math.isclose(min(plain), max(plain), rel_tol=1e-6):
            return [equal(mean)] * len(plain), [equal(mean)] * others
        return plain, neutral_rewards(kept, others)
    if options.estimator == "rloo" and options.penalties.stop_properly_penalty_coef is None:
        size, all_of_them = len(kept), len(kept) + others
        quotient = size * (all_of_them - 1) / ((size - 1) * all_of_them)
        # What a penalty takes off, it takes off after this.
        plain = [one + (quotient - 1) * (after - mean) for one, after in zip(plain, kept, strict=True)]
    return plain, [mean] * others


def _penalised(scored: Sequence[Rollout], plain: Sequence[float], penalties: Penalties) -> Sequence[float]:
    """The rewards after OpenRLHF's length penalties."""
    if not penalties.any:
        return plain
    import torch
    from openrlhf.trainer.ppo_utils.length_penalty import apply_length_penalties

    samples = [sample_of(rollout) for rollout in scored]
    experience = SimpleNamespace(
        rewards=torch.tensor(plain, dtype=torch.float64),
        response_length=torch.tensor([sample.length for sample in samples]),
        truncated=torch.tensor([sample.truncated for sample in samples]),
        info={},
    )
    reward = SimpleNamespace(
        overlong_buffer_len=penalties.overlong_buffer_len,
        overlong_penalty_factor=penalties.overlong_penalty_factor,
        stop_properly_penalty_coef=penalties.stop_properly_penalty_coef,
    )
    lengths = SimpleNamespace(max_new_tokens=penalties.max_new_tokens)
    apply_length_penalties([experience], SimpleNamespace(reward=reward, rollout=lengths))
    return [float(one) for one in experience.rewards]
