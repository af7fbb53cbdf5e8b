"""The turns of a rollout whose calls did not name it: claimed of the gateway, by token ids that came back through Gym.

An agent that builds its own requests may drop the rollout's id. Where ids travel, they are on Gym's output items, or in
Gym's own capture for agents that hand back none. They say only which turns were this rollout's: what was sampled is
known to the gateway, and each turn is given out once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gymlink.gateway import OpenRollout, PolicyService
from gymlink.gym import captured_ids
from gymlink.rollout.response import Item, carried_ids
from gymlink.types import CallIds, ForkCause, Turn


@dataclass(frozen=True, slots=True)
class Claimed:
    """The turns that were found, oldest first, and how many calls are told of that nobody knows here."""

    turns: Sequence[Turn]
    unknown: int


NOTHING: Final = Claimed((), 0)


class Claims:
    """Claims turns of the gateway behind `policy`. `captures` is the folder of Gym's own capture, if it has one."""

    def __init__(self, policy: PolicyService, captures: Path | None = None) -> None:
        self._policy = policy
        self._captures = captures

    def take(self, rollout: OpenRollout, items: Sequence[Item]) -> Claimed:
        """Those that Gym tells of, in its final response or else in its capture. They are this rollout's from now."""
        calls = [*carried_ids(items)]
        if not calls and self._captures is not None:
            calls = captured_ids(self._captures, rollout.record.rollout_id)
        told = [*_linked(calls)]
        claimed = [(ids, self._policy.claim(rollout, ids)) for ids in told]
        found = [(ids, turn) for ids, turn in claimed if turn is not None]
        return Claimed(_chained(found), len(told) - len(found))


def _linked(calls: Iterable[CallIds]) -> Iterator[CallIds]:
    """Each call once, and with what it adds to the longest one before it that its prompt starts with."""
    kept: list[CallIds] = []
    kept_as: dict[int, CallIds] = {}  # of calls that others are told as additions to
    for call in calls:
        if call.extends is None:
            linked = _link(call, kept)
        else:
            linked = CallIds(call.added_ids, call.completion_ids, extends=kept_as[id(call.extends)])
        same = next((one for one in kept if linked.has_ids_of(one)), None)
        kept_as[id(call)] = linked if same is None else same
        if same is None:
            kept.append(linked)
            yield linked


def _link(call: CallIds, before: Sequence[CallIds]) -> CallIds:
    for one in sorted(before, key=lambda one: one.tokens, reverse=True):
        if one.tokens <= call.prompt_tokens and call.added_ids.startswith(one.ids):
            return CallIds(call.added_ids[one.tokens :], call.completion_ids, extends=one)
    return call


def _chained(found: Sequence[tuple[CallIds, Turn]]) -> list[Turn]:
    """The turns with the prompts that their ids tell."""
    turns: dict[int, Turn] = {}
    for ids, turn in found:
        extends = turns.get(id(ids.extends))
        added = ids.prompt_ids if extends is None else ids.added_ids
        cause = _why_no_parent(ids, [*turns.values()]) if turns and extends is None else None
        turns[id(ids)] = replace(turn, added_ids=added, extends=extends, cause=cause, index=len(turns))
    return [*turns.values()]


def _why_no_parent(call: CallIds, before: Sequence[CallIds]) -> ForkCause:
    """The likeliest cause: what the messages were is not known any more."""
    if any(one.prompt_tokens == call.prompt_tokens and one.prompt_ids == call.prompt_ids for one in before):
        return ForkCause.RESTARTED
    longest = max(one.tokens for one in before)
    return ForkCause.COMPACTED if call.prompt_tokens < longest else ForkCause.EDITED
