"""Rollouts as rows for verl: nothing sampled is lost without a name, and nothing is invented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from gymlink.align import build_segments
from gymlink.errors import RolloutError
from gymlink.types import DropReason, Rollout, RolloutRequest, RolloutStatus, Segment
from gymlink_verl.convert import Shape, masked_output, outputs_of
from whole_turns import WholeTurn, linked

END = 99
ROOMY = Shape(prompt_length=100, response_length=100, end=END)
ROW = {"responses_create_params": {"input": "go"}, "agent_ref": {"name": "agent"}}

ids = st.lists(st.integers(0, 50), max_size=4).map(tuple)


def rollout_of(told: Sequence[WholeTurn], *, history: Any = "fork", last: int | None = None, **more: Any) -> Rollout:
    turns = linked(told)
    segments, dropped = build_segments(turns, on_history_rewrite=history, last_turn=last)
    return Rollout(
        RolloutRequest(ROW, 0, "g"),
        "0.r",
        more.pop("status", RolloutStatus.COMPLETED),
        more.pop("reward", 0.5),
        segments=segments,
        turns=turns,
        sampled_tokens=sum(len(turn.completion_ids) for turn in turns),
        dropped=dropped,
        **more,
    )


def turn(prompt: Sequence[int], said: Sequence[int], parent: int | None = None, **more: Any) -> WholeTurn:
    return WholeTurn(tuple(prompt), tuple(said), tuple(-0.25 for _ in said), parent, more)


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    """Any tree of turns, under any way to treat a rewritten history, ending in any of its turns."""
    turns: list[WholeTurn] = []
    for index in range(draw(st.integers(1, 7))):
        parent = draw(st.one_of(st.none(), st.integers(0, index - 1))) if index else None
        added = draw(ids)
        prompt = (1, *added) if parent is None else (*turns[parent].prompt, *turns[parent].said, *added)
        turns.append(turn(prompt, draw(ids), parent=parent, weight_version=draw(st.integers(0, 3))))
    last = draw(st.integers(0, len(turns) - 1))
    return rollout_of(turns, history=draw(st.sampled_from(["fork", "last", "mask"])), last=last)


shapes = st.builds(Shape, st.integers(1, 8), st.integers(1, 12), st.just(END), padded=st.booleans())


@settings(deadline=None)
@given(rollouts(), shapes)
def test_every_sampled_token_is_trained_once_or_counted(rollout: Rollout, shape: Shape) -> None:
    outputs, figures = outputs_of(rollout, shape)
    trained = sum(sum(output.response_mask) for output in outputs)
    assert figures.tokens_trained == trained
    assert figures.segments == len(outputs)
    assert trained + sum(figures.dropped.values()) == rollout.sampled_tokens
    assert figures.dropped.get(DropReason.OVER_LENGTH, 0) == rollout.trained_tokens - trained
    assert [output.reward_score for output in outputs] == [None] * (len(outputs) - 1) + [rollout.reward]


@settings(deadline=None)
@given(rollouts(), shapes)
def test_every_row_is_its_segment_from_the_start(rollout: Rollout, shape: Shape) -> None:
    outputs, _ = outputs_of(rollout, shape)
    for output in outputs:
        sequence = [*output.prompt_ids, *output.response_ids]
        assert 1 <= len(output.response_ids) <= shape.response_length
        assert len(output.response_ids) == len(output.response_mask) == len(output.response_logprobs)
        if shape.padded:
            assert len(output.prompt_ids) <= shape.prompt_length
        assert any(_begins(segment, sequence) for segment in rollout.segments)
    trained = [output for output in outputs if any(output.response_mask)]
    assert outputs == trained or len(outputs) == 1, "a row that trains nothing stands for a rollout only when all do"


def _begins(segment: Segment, sequence: list[int]) -> bool:
    whole = [*segment.prompt_ids, *segment.response_ids]
    return whole[: len(sequence)] == sequence or (not segment.response_ids and sequence == [*whole, END])


def test_one_segment_is_one_row() -> None:
    first = turn([1, 2], [3, 4])
    second = turn([1, 2, 3, 4, 7, 8], [5], parent=0)
    [output], figures = outputs_of(
        rollout_of([first, second], seconds=3.0, seconds_in_model=1.0, status=RolloutStatus.TRUNCATED), ROOMY
    )
    assert output.prompt_ids == [1, 2]
    assert output.response_ids == [3, 4, 7, 8, 5]
    assert output.response_mask == [1, 1, 0, 0, 1]
    assert output.response_logprobs == [-0.25, -0.25, 0.0, 0.0, -0.25]
    assert (output.reward_score, output.num_turns) == (0.5, 4)
    assert (output.metrics.generate_sequences, output.metrics.tool_calls) == (1.0, 2.0)
    assert output.extra_fields["reward_extra_info"] == {"gym_turns": 2, "gym_truncated": 1, "gym_failed": 0}
    assert figures.tokens_trained == figures.tokens_sampled == 3


def test_a_rewritten_history_is_several_rows_the_final_one_last() -> None:
    turns = [turn([1], [2]), turn([5], [6, 7]), turn([5, 6, 7, 8], [9], parent=1)]
    outputs, figures = outputs_of(rollout_of(turns), ROOMY)
    assert [(output.prompt_ids, output.response_ids) for output in outputs] == [([1], [2]), ([5], [6, 7, 8, 9])]
    assert [output.num_turns for output in outputs] == [2, 4]
    assert figures.segments == 2


def test_what_is_too_long_is_cut_and_counted() -> None:
    rollout = rollout_of([turn([1], [2, 3, 4, 5])])
    [output], figures = outputs_of(rollout, replace(ROOMY, response_length=3))
    assert output.response_ids == [2, 3, 4]
    assert (figures.tokens_trained, figures.dropped) == (3, {DropReason.OVER_LENGTH: 1})


def test_a_cut_row_ends_with_a_token_that_is_trained() -> None:
    """On its last token verl puts the reward, and an estimator such as GAE takes none from a masked one."""
    turns = [turn([1], [2, 3]), turn([1, 2, 3, 8, 9], [4], parent=0)]
    for limit in (2, 3, 4):
        [output], figures = outputs_of(rollout_of(turns), replace(ROOMY, response_length=limit))
        assert (output.response_ids, output.response_mask) == ([2, 3], [1, 1])
        assert figures.dropped == {DropReason.OVER_LENGTH: 1}


def test_a_branch_of_which_nothing_is_left_is_no_row() -> None:
    """The turn that branched off lies wholly beyond the limit: the row would repeat what another one trains."""
    trunk = turn([1], [2, 3])
    branch = turn([1, 2, 3, 9, 9], [4], parent=0)
    final = turn([1, 2, 3, 8], [5], parent=0)
    outputs, figures = outputs_of(rollout_of([trunk, branch, final]), replace(ROOMY, response_length=4))
    assert [output.response_ids for output in outputs] == [[2, 3, 8, 5]]
    assert figures.dropped == {DropReason.OVER_LENGTH: 1}


def test_a_final_branch_of_which_nothing_is_left_does_not_stand_for_the_rollout() -> None:
    """The last row speaks for the rollout in its group; one that trains nothing would leave it without a voice."""
    trunk = turn([1], [2, 3])
    other = turn([1, 2, 3, 8], [5], parent=0)
    final = turn([1, 2, 3, 9, 9, 9], [4], parent=0)
    other_alone = turn([1], [2, 3])
    outputs, _ = outputs_of(rollout_of([other_alone, turn([7], [])]), ROOMY)
    assert [(output.response_ids, output.reward_score) for output in outputs] == [([2, 3], 0.5)]
    outputs, figures = outputs_of(rollout_of([trunk, other, final]), replace(ROOMY, response_length=4))
    assert [output.reward_score for output in outputs][-1] == 0.5
    assert all(any(output.response_mask) for output in outputs)
    assert figures.dropped == {DropReason.OVER_LENGTH: 1}


def test_a_long_prompt_of_the_legacy_trainer_stays_the_same_sequence() -> None:
    rollout = rollout_of([turn(range(10, 16), [2, 3])])
    [output], _ = outputs_of(rollout, Shape(prompt_length=4, response_length=5, end=END, padded=True))
    assert (output.prompt_ids, output.response_ids) == ([10, 11, 12, 13], [14, 15, 2, 3])
    assert output.response_mask == [0, 0, 1, 1]
    assert output.response_logprobs == [0.0, 0.0, -0.25, -0.25]
    [output], _ = outputs_of(rollout, Shape(prompt_length=4, response_length=5, end=END))
    assert output.prompt_ids == [10, 11, 12, 13, 14, 15], "V1's rows have no shape in common"


def test_an_empty_response_has_one_masked_token() -> None:
    [output], figures = outputs_of(rollout_of([turn([1, 2], [])]), ROOMY)
    assert (output.response_ids, output.response_mask, output.response_logprobs) == ([END], [0], [0.0])
    assert figures.tokens_trained == 0


def test_a_masked_row_for_a_failed_rollout() -> None:
    failed = Rollout(
        RolloutRequest(ROW, 0, "g"),
        "0.r",
        RolloutStatus.FAILED,
        None,
        turns=linked([turn([1, 2], [3], weight_version=4)]),
        failure="http",
        sampled_tokens=1,
        dropped={"failed": 1},
    )
    output = masked_output(failed, ROOMY, 0.75)
    assert (output.prompt_ids, output.response_ids, output.response_mask) == ([1, 2], [END], [0])
    assert (output.reward_score, output.num_turns, output.routed_experts) == (0.75, 0, None)
    assert output.extra_fields["reward_extra_info"]["gym_failed"] == 1
    assert output.extra_fields["min_global_steps"] == 4
    without_turns = masked_output(replace(failed, turns=()), ROOMY, 0.0)
    assert without_turns.prompt_ids, "verl takes no empty prompt"
    assert (without_turns.response_ids, without_turns.response_mask) == ([END], [0])


def test_the_versions_are_those_of_the_rows_own_turns() -> None:
    turns = [
        turn([1], [2], weight_version=3, oldest_weight_version=1),
        turn([5], [6], weight_version=4),
        turn([5, 6], [7], weight_version=6, oldest_weight_version=5, parent=1),
    ]
    outputs, _ = outputs_of(rollout_of(turns), ROOMY)
    spans = [(one.extra_fields["min_global_steps"], one.extra_fields["max_global_steps"]) for one in outputs]
    assert spans == [(1, 3), (4, 6)]


def test_routed_experts_are_those_of_the_last_turn_cut_to_the_row() -> None:
    def routed(tokens: int, fill: int) -> np.ndarray:
        return np.full((tokens, 2, 2), fill, dtype=np.int32)

    turns = [
        turn([1], [2, 3], routed_experts=routed(2, 1)),
        turn([1, 2, 3, 4], [5, 6], parent=0, routed_experts=routed(5, 2)),
    ]
    [output], _ = outputs_of(rollout_of(turns), ROOMY)
    assert output.routed_experts.shape == (5, 2, 2)
    assert (output.routed_experts == 2).all()
    [cut], _ = outputs_of(rollout_of(turns), replace(ROOMY, response_length=3))
    assert cut.routed_experts.shape == (1 + 2, 2, 2)
    assert cut.as_dict()["routed_experts"].shape == (3, 2, 2)
    whole = output.as_dict()["routed_experts"]
    assert whole.shape == (6, 2, 2), "verl fills up to the row's length"
    assert not whole[-1].any()


@settings(deadline=None, max_examples=50)
@given(rollouts(), shapes)
def test_verl_makes_tensors_of_every_row(rollout: Rollout, shape: Shape) -> None:
    outputs, _ = outputs_of(rollout, shape)
    for output in outputs:
        assert not {"reward", "acc"} & {*output.extra_fields, *output.extra_fields["reward_extra_info"]}
        assert {"turn_scores", "tool_rewards"} <= {*output.extra_fields}, "verl's log of a batch asks for these"
        made = output.as_dict()
        lengths = {len(made[name]) for name in ("responses", "response_mask", "rollout_log_probs")}
        assert lengths == {len(output.response_ids)}
        assert made["prompts"].dtype == made["responses"].dtype == torch.int64
    _as_v1_stores(outputs)


def _as_v1_stores(outputs: list[AgentLoopOutput]) -> None:
    """What `AgentLoopWorkerTQ._agent_loop_postprocess` (0.9.1) does with the rows of a rollout."""
    for output in outputs[:-1]:
        output.reward_score = outputs[-1].reward_score
        output.extra_fields["reward_extra_info"] = outputs[-1].extra_fields["reward_extra_info"]
    stored = list_of_dict_to_tensordict([output.as_dict() for output in outputs])
    assert stored.batch_size == (len(outputs),)
    assert [float(scores.sum()) for scores in stored["rm_scores"].unbind()] == [0.5] * len(outputs)
    assert {"prompts", "responses", "response_mask", "rollout_log_probs", "rm_scores"} <= set(stored.keys())


def test_figures_that_do_not_add_up_are_refused() -> None:
    wrong = replace(rollout_of([turn([1], [2, 3])]), sampled_tokens=5)
    with pytest.raises(RolloutError, match="5 tokens were sampled, but 2 are trained and 0"):
        outputs_of(wrong, ROOMY)
