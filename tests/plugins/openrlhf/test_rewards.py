"""What failed rollouts do to the others' advantages, by OpenRLHF's own arithmetic: nothing, but for what is named here.

The rewards of `group_rewards` go through OpenRLHF's whole way from responses to advantages, several groups in a batch,
and through the same way go the scored rollouts of each group alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from openrlhf.models.loss import PolicyLoss
from openrlhf.trainer.ppo_trainer import compute_eval_metrics
from openrlhf.trainer.ppo_utils import samples_generator

from gymlink.types import DropReason, Rollout, RolloutStatus
from gymlink_openrlhf.convert import Sample, placeholder, response_of, sample_of
from gymlink_openrlhf.options import GROUP_RELATIVE, Options, Penalties
from gymlink_openrlhf.rewards import GroupRewards, equal, group_rewards
from gymlink_tiny import make_model, make_tokenizer
from openrlhf_rollouts import failed, scored, turn
from openrlhf_steps import arguments, generator, of_samples, read, with_advantages

OVERLONG = Penalties(overlong_buffer_len=6.0, overlong_penalty_factor=0.5, max_new_tokens=8)
STOP_PROPERLY = Penalties(stop_properly_penalty_coef=0.5)
FIXED = Penalties(stop_properly_penalty_coef=-0.75)
BOTH = Penalties(6.0, 0.5, 0.25, 8)
PENALTIES = st.sampled_from([Penalties(), OVERLONG, STOP_PROPERLY, FIXED, BOTH])

STAND_IN = placeholder((7, 8), 9, -0.5)
CLOSE = 2e-4
"""Float32 subtracts rewards of up to 3, and group_norm divides what is left by a spread of 0.005 or more."""


@dataclass(frozen=True)
class Group:
    scored: Sequence[Rollout]
    failures: int

    @property
    def rewards(self) -> list[float]:
        return [rollout.reward for rollout in self.scored if rollout.reward is not None]

    @property
    def siblings(self) -> int:
        return len(self.scored) + self.failures


def said(reward: float, tokens: int = 3, truncated: bool = False) -> Rollout:
    status = RolloutStatus.TRUNCATED if truncated else RolloutStatus.COMPLETED
    return scored(reward, [turn((1, 2), tuple(range(3, 3 + tokens)))], status=status)


def group(*rewards: float | None, tokens: int = 3) -> Group:
    given = [said(reward, tokens) for reward in rewards if reward is not None]
    return Group(given, len(rewards) - len(given))


@st.composite
def batches(draw: st.DrawFn, fewest: int = 2) -> list[Group]:
    """Groups of one size, each with at least `fewest` scored. Rewards differ by a hundredth or not at all."""
    siblings = draw(st.integers(2, 6))
    rewards = st.integers(-300, 300).map(lambda hundredths: hundredths / 100) | st.sampled_from([0.0, 0.1, 1.0])
    one = st.builds(said, rewards, st.integers(1, 9), st.booleans())
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        members = draw(st.lists(one, min_size=min(fewest, siblings), max_size=siblings))
        groups.append(Group(members, siblings - len(members)))
    return groups


def options(estimator: str, penalties: Penalties = Penalties(), **more: Any) -> Options:  # noqa: B008 - frozen
    return Options(estimator, penalties=penalties, **more)


def responses(group: Group, rewards: GroupRewards) -> list[dict[str, Any]]:
    """As the executor tells them: placeholders for what is not trained, of a whole group also for what was scored."""
    mine = [
        STAND_IN if rewards.untrained == DropReason.ALONE_IN_GROUP else sample_of(rollout) for rollout in group.scored
    ]
    told = [
        response(rollout, sample, reward, score)
        for rollout, sample, reward, score in zip(group.scored, mine, rewards.rewards, rewards.scores, strict=True)
    ]
    return told + [response(failed(), STAND_IN, reward, rewards.other_score) for reward in rewards.others]


def response(rollout: Rollout, sample: Sample, reward: float, score: float) -> dict[str, Any]:
    return response_of(rollout, sample, prompt="go", label="{}", reward=reward, score=score, with_logprobs=True)


def flags(penalties: Penalties) -> dict[str, Any]:
    return {
        "overlong_buffer_len": penalties.overlong_buffer_len,
        "overlong_penalty_factor": penalties.overlong_penalty_factor,
        "stop_properly_penalty_coef": penalties.stop_properly_penalty_coef,
        "max_new_tokens": penalties.max_new_tokens or None,
    }


def trained(groups: Sequence[Group], chosen: Options, field: str = "returns") -> list[tuple[list[Any], list[Any]]]:
    """For each group, what OpenRLHF gives its scored rollouts and what its failed ones; one number for a rollout.

    `returns` are the advantages before those of some estimators are whitened over the batch.
    """
    every = [group_rewards(one.scored, one.failures, chosen, training=True) for one in groups]
    told = [one for each, rewards in zip(groups, every, strict=True) for one in responses(each, rewards)]
    batch = with_advantages(told, arguments(chosen.estimator, groups[0].siblings, **flags(chosen.penalties)))
    numbers = iter([one for [one, *_] in of_samples(batch, field)])
    return [([next(numbers) for _ in one.scored], [next(numbers) for _ in range(one.failures)]) for one in groups]


def alone(one: Group, chosen: Options) -> tuple[list[float], list[float]]:
    """What OpenRLHF gives the scored rollouts when there are no others; and their rewards after penalties."""
    told = [
        response(rollout, sample_of(rollout), reward, 0)
        for rollout, reward in zip(one.scored, one.rewards, strict=True)
    ]
    batch = with_advantages(told, arguments(chosen.estimator, len(told), **flags(chosen.penalties)))
    kept = [reward for each in batch for reward in each.rewards.tolist()]
    return [number for [number, *_] in of_samples(batch, "returns")], kept


def is_clear(one: Group, kept: Sequence[float]) -> bool:
    """Whether the rewards that penalties left differ by more than float32's last digits, or are equal as they came.

    What takes equal parts off equal rewards brings back the digits that `equal` leaves out.
    """
    return max(kept) - min(kept) > 0.004 or kept == pytest.approx([one.rewards[0]] * len(kept), rel=1e-6)


def growth(one: Group, chosen: Options) -> float:
    """By what the advantages of the scored rollouts are larger than alone, where they cannot be the same."""
    size, count = one.siblings, len(one.scored)
    if chosen.estimator == "group_norm" and one.failures == 1:
        return math.sqrt((size - 1) / (size - 2))
    if chosen.estimator == "rloo" and chosen.penalties.stop_properly_penalty_coef is not None:
        return size * (count - 1) / ((size - 1) * count)
    return 1.0


@pytest.mark.parametrize("estimator", sorted(GROUP_RELATIVE))
@settings(deadline=None, max_examples=60)
@given(groups=batches(), penalties=PENALTIES)
def test_the_scored_get_what_they_get_alone(estimator: str, groups: list[Group], penalties: Penalties) -> None:
    chosen = options(estimator, penalties)
    expected = [alone(one, chosen) for one in groups]
    assume(all(is_clear(one, kept) for one, (_, kept) in zip(groups, expected, strict=True)))
    for one, (wanted, kept), (found, _) in zip(groups, expected, trained(groups, chosen), strict=True):
        if estimator == "group_norm" and max(kept) == min(kept):
            assert found == [0] * len(kept) or not one.failures  # alone it can be anything, see below
        else:
            assert found == pytest.approx([growth(one, chosen) * number for number in wanted], abs=CLOSE)


@pytest.mark.parametrize("estimator", sorted(GROUP_RELATIVE))
@settings(deadline=None, max_examples=40)
@given(groups=batches(), penalties=PENALTIES)
def test_the_failed_are_not_trained(estimator: str, groups: list[Group], penalties: Penalties) -> None:
    """But for the two with which group_norm keeps the spread: of those one is as much above as the other below."""
    chosen = options(estimator, penalties)
    assume(all(is_clear(one, alone(one, chosen)[1]) for one in groups))
    for one, (_, found) in zip(groups, trained(groups, chosen), strict=True):
        if estimator == "group_norm" and one.failures > 1:
            assert sum(found) == pytest.approx(0, abs=CLOSE)
            assert found[2:] == pytest.approx([0] * (one.failures - 2), abs=CLOSE)
        else:
            assert found == pytest.approx([0] * one.failures, abs=CLOSE)


@pytest.mark.parametrize("estimator", sorted(GROUP_RELATIVE))
@settings(deadline=None, max_examples=40)
@given(st.builds(said, st.floats(-3, 3), st.integers(1, 9), st.booleans()), st.integers(1, 30), PENALTIES)
def test_where_one_alone_was_scored_nothing_is_trained(
    estimator: str, one: Rollout, failures: int, penalties: Penalties
) -> None:
    [(mine, others)] = trained([Group([one], failures)], options(estimator, penalties))
    assert [*mine, *others] == pytest.approx([0] * (failures + 1), abs=1e-6)


def test_openrlhf_makes_advantages_of_equal_rewards() -> None:
    """In float32 their mean is one digit off, and the spread is no larger: so `equal` rewards are of few digits."""
    found = [
        number for [number, *_] in of_samples(with_advantages(_equal(0.1, 7), arguments("group_norm", 7)), "returns")
    ]
    assert [abs(number) > 0.5 for number in found] == [True] * 7, "OpenRLHF has mended this: `equal` can go"


@settings(deadline=None, max_examples=50)
@given(st.floats(-1e6, 1e6), st.integers(2, 64))
def test_equal_rewards_of_few_digits_are_none(reward: float, siblings: int) -> None:
    assert equal(reward) == pytest.approx(reward, rel=1e-4, abs=1e-30)
    batch = with_advantages(_equal(equal(reward), siblings), arguments("group_norm", siblings))
    assert of_samples(batch, "returns") == [[0.0]] * siblings


def _equal(reward: float, siblings: int) -> list[dict[str, Any]]:
    return [response(failed(), STAND_IN, reward, reward) for _ in range(siblings)]


# Estimators without a group.


@settings(deadline=None, max_examples=30)
@given(groups=batches(fewest=1), penalties=PENALTIES)
def test_reinforce_takes_the_others_for_the_mean(groups: list[Group], penalties: Penalties) -> None:
    chosen = options("reinforce", penalties)
    for one, (mine, others) in zip(groups, trained(groups, chosen), strict=True):
        _, kept = alone(one, chosen)
        assert mine == pytest.approx(kept, abs=1e-5)
        assert others == pytest.approx([fmean(kept)] * one.failures, abs=1e-5)


@settings(deadline=None, max_examples=30)
@given(groups=batches(fewest=1), penalties=PENALTIES)
def test_flash_reinforce_takes_the_others_for_the_mean(groups: list[Group], penalties: Penalties) -> None:
    """Its baseline is then the mean of the groups' means, whatever number of each failed."""
    chosen = options("flash_reinforce", penalties)
    kept = [alone(one, Options("reinforce", penalties=penalties))[1] for one in groups]
    baseline = fmean(fmean(rewards) for rewards in kept)
    for rewards, (mine, others) in zip(kept, trained(groups, chosen), strict=True):
        assert mine == pytest.approx([reward - baseline for reward in rewards], abs=1e-5)
        assert others == pytest.approx([fmean(rewards) - baseline] * len(others), abs=1e-5)


@given(values=st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4))
@settings(deadline=None, max_examples=20)
def test_gae_takes_the_others_for_the_mean(values: list[float]) -> None:
    """What is left of it is the critic's error at the placeholder, which is what a critic learns from."""
    rewards = group_rewards(group(1.0, 0.0).scored, 2, options("gae"), training=True)
    told = responses(group(1.0, 0.0, None, None), rewards)
    batch = with_advantages(told, arguments("gae", 4), values)
    assert [number for [*_, number] in of_samples(batch, "returns")] == pytest.approx([1.0, 0.0, 0.5, 0.5], abs=1e-6)


# What OpenRLHF does with advantages after that.


@given(groups=batches())
@settings(deadline=None, max_examples=60)
def test_whitening_over_the_batch_counts_the_failed_as_zeros(groups: list[Group]) -> None:
    """reinforce_baseline: all advantages of the batch, token by token, less their mean and over their deviation.

    A placeholder is one token of advantage 0 in it, and then what the mean is off zero: that is by how much longer
    responses were better ones or worse.
    """
    chosen = options("reinforce_baseline")
    before = trained(groups, chosen)
    tokens = [
        number
        for one, (mine, others) in zip(groups, before, strict=True)
        for rollout, number in zip([*one.scored, *[None] * one.failures], [*mine, *others], strict=True)
        for _ in range(rollout.trained_tokens if rollout else 1)
    ]
    mean = fmean(tokens)
    deviation = math.sqrt(fmean((number - mean) ** 2 for number in tokens))
    assume(deviation > 0.005)
    for (mine, others), (white, of_others) in zip(before, trained(groups, chosen, "advantages"), strict=True):
        assert white == pytest.approx([(number - mean) / deviation for number in mine], abs=1e-3)
        assert of_others == pytest.approx([-mean / deviation] * len(others), abs=1e-3)


def test_whitening_leaves_the_failed_at_zero_where_responses_are_as_long() -> None:
    groups = [group(1.0, 0.0, None, 0.25), group(None, 0.5, None, 3.0)]
    for _, others in trained(groups, options("reinforce_baseline"), "advantages"):
        assert others == pytest.approx([0] * len(others), abs=1e-6)


@pytest.mark.parametrize("loss", [PolicyLoss(), PolicyLoss(token_level_loss=False), PolicyLoss(dual_clip=3.0)])
@pytest.mark.parametrize("failures", [2, 3, 5])
def test_the_two_that_keep_the_spread_cancel_in_the_gradient(loss: PolicyLoss, failures: int) -> None:
    """They are one and the same sequence, so in one step of the optimizer they push it up and down alike."""
    spoken = [(1.0, (3, 4, 5)), (0.0, (6, 7)), (0.25, (10, 11, 12, 13))]
    one = Group([scored(reward, [turn((1, 2), ids)]) for reward, ids in spoken], failures)
    rewards = group_rewards(one.scored, failures, options("group_norm"), training=True)
    batch = with_advantages(responses(one, rewards), arguments("group_norm", one.siblings, micro_batch_size=8))
    [whole] = batch
    advantages = of_samples(batch, "advantages")
    assert max(number for [number] in advantages[3:]) > 0.5, "there is something to cancel"

    every = _gradient(loss, whole, range(one.siblings))
    mine = _gradient(loss, whole, range(3))
    above = _gradient(loss, whole, [3])
    assert (every - mine).abs().max() < 1e-4 * above.abs().max()
    assert mine.abs().max() > 1e-4


def _gradient(loss: PolicyLoss, whole: Any, members: Sequence[int]) -> torch.Tensor:
    """Of some members of a batch, scaled as in the whole of it, after the policy moved a little."""
    model = make_model(make_tokenizer())
    rows = list(members)
    ids, mask = whole.sequences[rows], whole.action_mask[rows]
    logits = model(input_ids=ids, attention_mask=whole.attention_mask[rows]).logits[:, :-1].float()
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    scale = {"batch_num_tokens": float(whole.action_mask.sum()), "global_batch_size": float(len(whole.sequences))}
    loss(logprobs, logprobs.detach() - 0.05, whole.advantages[rows], mask, **scale)[0].backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


# Evaluation, and dynamic filtering.


@given(
    st.lists(
        st.tuples(st.lists(st.integers(-8, 8).map(lambda eighths: eighths / 8), min_size=1, max_size=4), st.booleans()),
        min_size=1,
        max_size=5,
    )
)
@settings(deadline=None)
def test_evaluation_tells_the_figures_of_the_scored(prompts: list[tuple[list[float], bool]]) -> None:
    told, chosen = [], options("group_norm", BOTH, filtering=(0.2, 0.3))
    for number, (scores, _) in enumerate(prompts):
        one = Group([said(score, 9, truncated=True) for score in scores], 4 - len(scores))
        rewards = group_rewards(one.scored, one.failures, chosen, training=False)
        assert rewards.untrained is None
        told += [each | {"prompt": str(number)} for each in responses(one, rewards)]
    loader = [[["here" if here else "there"], [str(at)], [""], [None]] for at, (_, here) in enumerate(prompts)]
    metrics = compute_eval_metrics(loader, [read(each) for each in told], 4)
    for source, is_here in (("here", True), ("there", False)):
        every = [rewards for rewards, here in prompts if here is is_here]
        if every:
            assert metrics[f"eval_{source}_pass1"] == pytest.approx(fmean(map(fmean, every)), abs=1e-6)
            assert metrics[f"eval_{source}_pass4"] == pytest.approx(fmean(map(max, every)), abs=1e-6)


class Filtered:
    """OpenRLHF's own collection with dynamic filtering, of groups that are there already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, low: float, high: float) -> None:
        self.generator = generator()
        self.generator.args = SimpleNamespace(algo=SimpleNamespace(dynamic_filtering_range=(low, high)))
        self.generator._dispatch_prompts_to_vllm = lambda prompts, *_, **__: list(prompts)
        ray = SimpleNamespace(wait=lambda refs, **_: (refs[:1], refs[1:]), get=lambda ref: ref)
        monkeypatch.setattr(samples_generator, "ray", ray)
        self.options = options("group_norm", filtering=(low, high), siblings=4)

    def kept(self, *groups: Group) -> list[int]:
        """Which of the groups are trained on, when one at a time is asked for."""
        told = []
        for number, one in enumerate(groups):
            rewards = group_rewards(one.scored, one.failures, self.options, training=True)
            told.append([each | {"prompt": number} for each in responses(one, rewards)])
        experiences, consumed, _ = self.generator._generate_vllm(self._loader(told), 1, dynamic_filtering=True)
        assert consumed == experiences[0].prompts[0] + 1 if experiences else consumed == len(groups)
        return list(dict.fromkeys(one.prompts[0] for one in experiences))

    def reason(self, one: Group) -> str | None:
        return group_rewards(one.scored, one.failures, self.options, training=True).untrained

    def _loader(self, told: list[list[dict[str, Any]]]) -> Iterator[Any]:
        return iter([(None, [one], [None], [None]) for one in told])


def test_a_failed_rollout_does_not_move_the_average_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds solved it; as a 0 or a 1 among them, the failed one would take the group out of this range."""
    filtered = Filtered(monkeypatch, 0.6, 0.7)
    two_thirds = group(1.0, 1.0, 0.0, None)
    assert filtered.kept(two_thirds) == [0]
    assert filtered.reason(two_thirds) is None


@pytest.mark.parametrize(
    ("left_out", "reason"),
    [
        (group(1.0, 1.0, 1.0, 1.0), DropReason.FILTERED),
        (group(1.0, None, 1.0, None), DropReason.FILTERED),
        (group(0.0, 0.0, None, 0.0), DropReason.FILTERED),
        (group(0.5, None, None, None), DropReason.ALONE_IN_GROUP),
    ],
)
def test_what_filtering_leaves_out_is_replaced_and_counted(
    monkeypatch: pytest.MonkeyPatch, left_out: Group, reason: str
) -> None:
    filtered = Filtered(monkeypatch, 0, 1)
    assert filtered.kept(left_out, left_out, group(1.0, 0.0, None, None)) == [2]
    assert filtered.reason(left_out) == reason


def test_a_group_without_a_score_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor gives it no number for a score."""
    filtered = Filtered(monkeypatch, 0, 1)
    told = [response(failed(), STAND_IN, 0.5, math.nan) | {"prompt": 0} for _ in range(4)]
    assert filtered.generator._generate_vllm(filtered._loader([told, told]), 1, dynamic_filtering=True) == ([], 2, True)


@pytest.mark.parametrize("estimator", ["gae", "reinforce", "flash_reinforce"])
def test_one_alone_teaches_where_no_group_is_compared(estimator: str) -> None:
    rewards = group_rewards(group(0.5).scored, 3, options(estimator, filtering=(0.0, 1.0)), training=True)
    assert rewards == GroupRewards([0.5], [0.5], [0.5] * 3, 0.5)


def test_a_whole_group_is_left_as_it_is() -> None:
    rewards = group_rewards(group(0.1, 0.1, 0.7).scored, 0, options("rloo", BOTH), training=True)
    assert (list(rewards.rewards), list(rewards.scores), list(rewards.others)) == ([0.1, 0.1, 0.7], [0.1, 0.1, 0.7], [])
