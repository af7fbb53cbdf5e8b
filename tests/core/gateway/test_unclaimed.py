"""What a gateway remembers of calls that named no rollout."""

from dataclasses import replace

from gymlink.gateway.unclaimed import Unclaimed
from gymlink.types import CallIds, ForkCause, Turn


def turn(prompt: tuple[int, ...], completion: tuple[int, ...], version: int = 0) -> Turn:
    return Turn(prompt, completion, tuple(-float(one) for one in completion), "stop", version)


def test_where_it_stood_in_another_conversation_is_forgotten() -> None:
    unclaimed = Unclaimed()
    unclaimed.add(replace(turn((3,), (2,)), extends=turn((1,), ()), index=3))
    unclaimed.add(replace(turn((1, 3), (2,)), cause=ForkCause.EDITED))
    assert [unclaimed.claim(CallIds((1, 3), (2,))) for _ in range(2)] == [turn((), (2,))] * 2


def test_a_turn_is_found_by_all_its_ids_and_once() -> None:
    unclaimed = Unclaimed()
    unclaimed.add(turn((1, 2), (3,)))
    assert unclaimed.claim(CallIds((1,), (2, 3))) is None
    assert unclaimed.claim(CallIds((1, 2), (4,))) is None
    assert unclaimed.claim(CallIds((1, 2), (3,))) == turn((), (3,))
    assert unclaimed.claim(CallIds((1, 2), (3,))) is None


def test_of_equal_turns_each_is_claimed_in_the_order_in_which_they_came() -> None:
    unclaimed = Unclaimed()
    for version in (1, 2):
        unclaimed.add(turn((1,), (2,), version))
    claimed = [unclaimed.claim(CallIds((1,), (2,))) for _ in range(3)]
    assert [one and one.weight_version for one in claimed] == [1, 2, None]


def test_the_oldest_are_forgotten() -> None:
    unclaimed = Unclaimed(max_tokens=4)
    for first in range(4):
        unclaimed.add(turn((first,), (7, 8)))
    assert [unclaimed.claim(CallIds((first,), (7, 8))) is not None for first in range(4)] == [False, False, True, True]
    unclaimed.add(turn((1,), (1, 2, 3, 4, 5)))
    assert unclaimed.claim(CallIds((1,), (1, 2, 3, 4, 5))) is None


def test_an_empty_completion_can_be_claimed() -> None:
    unclaimed = Unclaimed()
    unclaimed.add(turn((1,), ()))
    assert unclaimed.claim(CallIds((1,), ())) == turn((), ())
