"""Rollouts as samples for OpenRLHF: nothing sampled is lost without a name, and OpenRLHF reads what was meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openrlhf.trainer.ppo_utils.experience import Experience

from gymlink.types import Rollout, RolloutStatus
from gymlink_openrlhf.convert import Sample, _ranges, is_trainable, placeholder, response_of, sample_of, sampled_in
from openrlhf_rollouts import failed, rollouts, scored, turn
from openrlhf_steps import read


def response(rollout: Rollout, sample: Sample, **more: Any) -> dict[str, Any]:
    given = {"prompt": "go", "label": "{}", "reward": 0.5, "score": 0.25, "with_logprobs": True, **more}
    return response_of(rollout, sample, **given)


def positions(sample: Sample) -> list[int]:
    return [at for begin, end in sample.ranges for at in range(begin, end)]


@settings(deadline=None)
@given(rollouts())
def test_a_sample_is_the_segment_up_to_its_last_trained_token(rollout: Rollout) -> None:
    segment, sample = rollout.segments[-1], sample_of(rollout)
    start, size = len(segment.prompt_ids), len(sample.ids)
    trained = [start + at for at, on in enumerate(segment.response_mask) if on]
    assert positions(sample) == trained
    assert list(sample.ids) == [*segment.prompt_ids, *segment.response_ids][:size]
    assert list(sample.logprobs) == [*[0.0] * start, *segment.response_logprobs][:size]
    assert size == (trained[-1] + 1 if trained else start)
    assert all(begin < end for begin, end in sample.ranges)
    assert all(before[1] < after[0] for before, after in zip(sample.ranges, sample.ranges[1:], strict=False))
    assert sample.truncated == (rollout.status is RolloutStatus.TRUNCATED)


@settings(deadline=None)
@given(rollouts())
def test_each_sampled_token_is_in_a_range_or_counted_with_a_reason(rollout: Rollout) -> None:
    trained = len(positions(sample_of(rollout)))
    assert trained == rollout.trained_tokens
    assert trained + sum(rollout.dropped.values()) == rollout.sampled_tokens


@settings(deadline=None)
@given(rollouts())
def test_openrlhf_reads_the_sample(rollout: Rollout) -> None:
    """Mask and logprobs without the first position, which nothing predicts: that is how OpenRLHF aligns them."""
    if not is_trainable(rollout):
        return
    sample = sample_of(rollout)
    experience = read(response(rollout, sample))
    assert experience.sequences.tolist() == [list(sample.ids)]
    assert experience.attention_mask.tolist() == [[1] * len(sample.ids)]
    assert [at + 1 for at in torch.where(experience.action_mask[0])[0].tolist()] == positions(sample)
    assert experience.rollout_log_probs[0].tolist() == list(sample.logprobs[1:])
    assert experience.response_length.item() == sample.length
    assert experience.total_length.item() == len(sample.ids)
    assert experience.truncated.item() == sample.truncated
    assert (experience.rewards.item(), experience.scores.item()) == (0.5, 0.25)


def test_several_ranges_and_what_the_environment_wrote_last() -> None:
    first = turn((1, 2), (3, 4))
    second = turn((1, 2, 3, 4, 9), (5,), parent=0)
    third = turn((1, 2, 3, 4, 9, 5, 9, 9), (), parent=1)  # the policy says nothing more
    sample = sample_of(scored(1.0, [first, second, third]))
    assert sample == Sample([1, 2, 3, 4, 9, 5], [(2, 4), (5, 6)], [0, 0, -0.25, -0.5, 0, -0.25])
    assert sample.length == 4
    experience = read(response(scored(1.0), sample))
    assert experience.action_mask.tolist() == [[0, 1, 1, 0, 1]]
    assert experience.rollout_log_probs.tolist() == [[0, -0.25, -0.5, 0, -0.25]]


def test_a_sample_as_long_as_the_context_is_read_whole() -> None:
    rollout = scored(1.0)
    experience = read(response(rollout, sample_of(rollout)), max_length=5)
    assert experience.action_mask.tolist() == [[0, 1, 1, 1]]


def test_without_importance_sampling_there_are_no_logprobs() -> None:
    rollout = scored(1.0)
    assert read(response(rollout, sample_of(rollout), with_logprobs=False)).rollout_log_probs is None


def test_a_placeholder_is_one_token_that_was_sampled() -> None:
    sample = placeholder((7, 8), 9, -0.5)
    assert sample == Sample([7, 8, 9], [(2, 3)], [0, 0, -0.5])
    experience = read(response(failed(), sample))
    assert experience.action_mask.tolist() == [[0, 1]]
    assert experience.rollout_log_probs.tolist() == [[0, -0.5]]
    assert not experience.truncated.item()


def test_a_placeholder_comes_from_the_first_that_sampled_anything() -> None:
    silent = failed([turn((1,), ())])
    spoke = failed([turn((4,), ()), turn((4, 5), (6, 7))])
    assert sampled_in([failed(), silent, spoke, scored(1.0)]) == placeholder((4, 5), 6, -0.25)
    assert sampled_in([failed(), silent]) is None


@given(rollouts())
def test_what_can_be_trained_was_scored_and_has_a_token(rollout: Rollout) -> None:
    assert is_trainable(rollout) == bool(sample_of(rollout).ranges)


def test_a_failed_rollout_cannot_be_trained() -> None:
    assert not is_trainable(failed([turn((1,), (2,))]))


def test_a_cut_rollout_that_is_stood_for_is_not_penalised_for_it() -> None:
    cut = scored(1.0, status=RolloutStatus.TRUNCATED)
    assert response(cut, sample_of(cut))["truncated"]
    assert not response(cut, placeholder((1,), 2, -0.5))["truncated"]


def test_what_is_logged_of_a_rollout() -> None:
    both = [response(rollout, placeholder((1,), 2, -0.5))["extra_logs"] for rollout in (scored(1.0), failed())]
    assert both[0] == {
        "gym_turns": 1.0,
        "gym_failed": 0.0,
        "gym_truncated": 0.0,
        "gym_prefix_breaks": 0.0,
        "gym_tokens_sampled": 3.0,
        "gym_tokens_trained": 3.0,
    }
    assert both[1] == dict.fromkeys(both[0], 0.0) | {"gym_failed": 1.0}
    assert all(type(value) is float for value in both[1].values())


def test_samples_of_any_rollouts_make_one_batch() -> None:
    """As OpenRLHF puts them together: lengths differ, the figures must not."""
    made = [
        read(response(rollout, sample))
        for rollout, sample in [
            (scored(1.0), sample_of(scored(1.0))),
            (failed(), placeholder((7, 8, 9, 10, 11, 12), 9, -0.5)),
        ]
    ]
    batch = Experience.concat_experiences(made, pad_token_id=0)
    assert batch.action_mask.tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert batch.info["gym_failed"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("reward", [1, 0, 2.5])
def test_rewards_are_floats(reward: float) -> None:
    """One whole number among them would make OpenRLHF's batch one of whole numbers."""
    told = response(scored(1.0), sample_of(scored(1.0)), reward=reward, score=reward)
    assert type(told["reward"]) is type(told["scores"]) is float


@given(st.lists(st.integers(0, 1), min_size=1, max_size=12))
def test_ranges_are_as_long_as_can_be(mask: list[int]) -> None:
    found = list(_ranges(mask, 3))
    assert [at - 3 for begin, end in found for at in range(begin, end)] == [at for at, on in enumerate(mask) if on]
    assert len(found) == sum(on and not before for before, on in zip([0, *mask], mask, strict=False))
