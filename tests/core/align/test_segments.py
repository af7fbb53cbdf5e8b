"""Conservation: every sampled token is trained once, or counted under the reason why not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gymlink.align import build_segments
from gymlink.errors import AlignmentError
from gymlink.types import Turn

POLICIES = ("fork", "last", "mask")
ids = st.lists(st.integers(0, 50), max_size=4).map(tuple)


@st.composite
def trees(draw: st.DrawFn) -> list[Turn]:
    turns: list[Turn] = []
    for index in range(draw(st.integers(1, 8))):
        parent = draw(st.one_of(st.none(), st.integers(0, index - 1))) if index else None
        added = draw(ids)
        prompt = (1, *added) if parent is None else added
        extends = None if parent is None else turns[parent]
        completion = draw(ids)
        logprobs = tuple(-float(index) for _ in completion)
        turns.append(Turn(prompt, completion, logprobs, "stop", extends=extends, index=index))
    return turns


@settings(deadline=None)
@given(trees(), st.sampled_from(POLICIES), st.data())
def test_every_sampled_token_is_accounted_for(turns: list[Turn], policy: str, data: st.DataObject) -> None:
    last = data.draw(st.one_of(st.none(), st.integers(0, len(turns) - 1)))
    segments, dropped = build_segments(turns, on_history_rewrite=policy, last_turn=last)
    sampled = sum(len(turn.completion_ids) for turn in turns)
    assert sampled == sum(segment.trained_tokens for segment in segments) + sum(dropped.values())
    final = turns[-1 if last is None else last]
    assert segments[-1].prompt_ids + segments[-1].response_ids == final.prompt_ids + final.completion_ids
    if policy == "fork":
        assert not dropped
        assert all(segment.trained_tokens for segment in segments[:-1])
        for segment in segments:
            for mask, logprob in zip(segment.response_mask, segment.response_logprobs, strict=True):
                assert mask == 0 or logprob <= 0


@settings(deadline=None)
@given(trees())
def test_trained_tokens_are_the_sampled_ones_with_their_logprobs(turns: list[Turn]) -> None:
    segments, _ = build_segments(turns, on_history_rewrite="fork")
    trained = sorted(
        (token, logprob)
        for segment in segments
        for token, mask, logprob in zip(
            segment.response_ids, segment.response_mask, segment.response_logprobs, strict=True
        )
        if mask
    )
    sampled = sorted(pair for turn in turns for pair in zip(turn.completion_ids, turn.logprobs, strict=True))
    assert trained == sampled


def test_one_chain_is_one_segment() -> None:
    first = Turn((1, 2), (3, 4), (-0.1, -0.2), "stop")
    second = Turn((5,), (6,), (-0.3,), "stop", extends=first, index=1)
    for policy in POLICIES:
        (segment,), dropped = build_segments([first, second], on_history_rewrite=policy)
        assert segment.prompt_ids == (1, 2)
        assert segment.response_ids == (3, 4, 5, 6)
        assert segment.response_mask == (1, 1, 0, 1)
        assert segment.response_logprobs == (-0.1, -0.2, 0.0, -0.3)
        assert dropped == {}


def test_a_shared_prefix_is_trained_on_the_final_branch_only() -> None:
    root = Turn((1,), (2, 3), (-0.1, -0.1), "stop")
    left = Turn((9,), (4,), (-0.2,), "stop", extends=root, index=1)
    right = Turn((8,), (5, 6), (-0.3, -0.3), "stop", extends=root, index=2)
    (branch, final), _ = build_segments([root, left, right], on_history_rewrite="fork")
    assert branch.response_mask == (0, 0, 0, 1)
    assert branch.response_logprobs == (-0.1, -0.1, 0.0, -0.2)
    assert final.response_mask == (1, 1, 0, 1, 1)
    (only,), dropped = build_segments([root, left, right], on_history_rewrite="last")
    assert (only, dropped) == (final, {"other_branch": 1})
    (masked,), dropped = build_segments([root, left, right], on_history_rewrite="mask")
    assert (masked.trained_tokens, dropped) == (0, {"history_rewritten": 5})


def test_turns_that_are_not_those_of_one_rollout_are_an_error() -> None:
    first = Turn((1,), (2,), (-0.1,), "stop")
    turns = [first, Turn((3,), (4,), (-0.1,), "stop", extends=first, index=1)]
    stranger = Turn((9,), (2,), (-0.1,), "stop", extends=Turn((1,), (), (), "stop"), index=1)
    for wrong in ([first, stranger], turns[1:], [first, first], [*turns[::-1]]):
        with pytest.raises(AlignmentError, match="not those of one rollout"):
            build_segments(wrong, on_history_rewrite="fork")
    with pytest.raises(AlignmentError, match="number 5"):
        build_segments(turns, on_history_rewrite="fork", last_turn=5)


def test_nothing_sampled_is_nothing() -> None:
    assert build_segments([], on_history_rewrite="fork") == ((), {})
