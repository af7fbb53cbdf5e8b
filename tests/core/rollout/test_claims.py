"""Calls of which only the ids are known: each once, and with what it adds to the one that it goes on from."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gymlink.rollout.claims import _chained, _linked
from gymlink.types import CallIds, ForkCause, Turn


def turn_of(call: CallIds) -> Turn:
    return Turn((), call.completion_ids, [-0.5] * len(call.completion_ids), "stop")


def chained(*calls: CallIds) -> list[Turn]:
    return _chained([(call, turn_of(call)) for call in _linked(calls)])


def test_whole_prompts_are_held_as_what_they_add() -> None:
    calls = [CallIds((1, 2), (3,)), CallIds((1, 2, 3, 4), (5,)), CallIds((1, 2, 3, 9), (6,)), CallIds((8,), (7,))]
    turns = chained(*calls, calls[1])
    assert [turn.parent for turn in turns] == [None, 0, 0, None]
    assert [turn.added_ids for turn in turns] == [(1, 2), (4,), (9,), (8,)]
    assert [turn.prompt_ids for turn in turns] == [call.prompt_ids for call in calls]
    assert [turn.cause for turn in turns] == [None, None, None, ForkCause.COMPACTED]


def test_what_gym_told_as_an_addition_stays_one() -> None:
    first = CallIds((1,), (2,))
    turns = chained(first, CallIds((3,), (4,), extends=first))
    assert [turn.prompt_ids for turn in turns] == [(1,), (1, 2, 3)]
    assert turns[1].extends is turns[0]


def test_the_same_prompt_again_is_a_restart() -> None:
    assert [turn.cause for turn in chained(CallIds((1,), (2,)), CallIds((1,), (3,)))] == [None, ForkCause.RESTARTED]


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=5), st.lists(st.integers(0, 1), max_size=2)), max_size=6)
)
def test_no_id_is_lost_or_invented(told: list[tuple[list[int], list[int]]]) -> None:
    calls = [CallIds(prompt, completion) for prompt, completion in told]
    turns = chained(*calls)
    assert {(turn.prompt_ids, turn.completion_ids) for turn in turns} == {
        (call.prompt_ids, call.completion_ids) for call in calls
    }
    for turn in turns:
        longest = max((one.tokens for one in turns[: turn.index] if turn.prompt_ids.startswith(one.ids)), default=None)
        assert (turn.extends and turn.extends.tokens) == longest
