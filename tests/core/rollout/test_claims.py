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


def test_what_is_told_as_an_addition_to_a_call_that_was_told_twice_stays_one() -> None:
    first, again = CallIds((1,), (2,)), CallIds((1,), (2,))
    assert [turn.parent for turn in chained(first, again, CallIds((3,), (4,), extends=again))] == [None, 0]


def test_what_is_told_as_an_addition_to_a_whole_prompt_stays_one() -> None:
    first, whole = CallIds((1,), (2,)), CallIds((1, 2, 3), (4,))
    turns = chained(first, whole, last := CallIds((5,), (6,), extends=whole), CallIds((7,), (8,), extends=last))
    assert [turn.parent for turn in turns] == [None, 0, 1, 2]
    assert turns[-1].prompt_ids == (1, 2, 3, 4, 5, 6, 7)


def test_the_same_prompt_again_is_a_restart() -> None:
    assert [turn.cause for turn in chained(CallIds((1,), (2,)), CallIds((1,), (3,)))] == [None, ForkCause.RESTARTED]


_ids = st.lists(st.integers(0, 1), max_size=4)


@given(st.lists(st.tuples(_ids, _ids, st.none() | st.integers(0, 5)), max_size=6))
def test_no_id_is_lost_or_invented(told: list[tuple[list[int], list[int], int | None]]) -> None:
    calls: list[CallIds] = []
    for prompt, completion, extended in told:
        extends = calls[extended % len(calls)] if calls and extended is not None else None
        calls.append(CallIds(prompt, completion, extends=extends))
    turns = chained(*calls)
    assert {(turn.prompt_ids, turn.completion_ids) for turn in turns} == {
        (call.prompt_ids, call.completion_ids) for call in calls
    }
    for turn in turns:
        earlier = [one for one in turns[: turn.index] if turn.prompt_ids.startswith(one.ids)]
        assert bool(earlier) == (turn.extends is not None), "one that goes on from another is no new branch"
