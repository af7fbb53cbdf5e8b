"""Siblings wait for each other, and no group outlives its last one."""

from __future__ import annotations

from gymlink.rollout import Siblings
from gymlink.types import Rollout, RolloutRequest, RolloutStatus

REQUEST = RolloutRequest({"agent_ref": {"name": "agent"}}, 0)


def rollout(reward: float | None) -> Rollout:
    return Rollout(REQUEST, "r", RolloutStatus.FAILED if reward is None else RolloutStatus.COMPLETED, reward)


def test_a_group_is_complete_with_its_last() -> None:
    siblings = Siblings()
    groups = [siblings.join("a") for _ in range(3)]
    other = siblings.join("b")
    assert groups[0] is groups[1] is groups[2] is not other
    first, second = rollout(0.0), rollout(None)
    siblings.leave("a", first)
    siblings.leave("a", second)
    assert not groups[0].complete.is_set()
    siblings.leave("a", None)
    assert groups[0].complete.is_set()
    assert not other.complete.is_set()
    assert groups[0].ended == [first, second], "one that ended by an error has no rollout"
    assert groups[0].scored == [first], "a reward of zero is a score"


def test_the_same_prompt_again_is_a_new_group() -> None:
    """Validation and a resumed run may bring a uid again; nothing is kept of the one that ended."""
    siblings = Siblings()
    before = siblings.join("a")
    siblings.leave("a", rollout(1.0))
    after = siblings.join("a")
    assert after is not before
    assert (after.members, after.ended, after.complete.is_set()) == (1, [], False)
