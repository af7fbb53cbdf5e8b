"""The turns of a rollout whose calls did not name it: claimed of the gateway, by token ids that came back through Gym.

An agent that builds its own requests may drop the rollout's id. Where ids travel, they are on Gym's output items, or in
Gym's own capture for agents that hand back none. They say only which turns were this rollout's: what was sampled is
known to the gateway, and each turn is given out once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gymlink.gateway import OpenRollout, PolicyService
from gymlink.gym import captured_ids
from gymlink.rollout.response import Item, carried_ids
from gymlink.types import ForkCause, TokenIds, Turn


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
        told = [*carried_ids(items)]
        if not told and self._captures is not None:
            told = captured_ids(self._captures, rollout.record.rollout_id)
        told = [*dict.fromkeys(told)]
        claimed = [self._policy.claim(rollout, ids.prompt, ids.completion) for ids in told]
        found = [turn for turn in claimed if turn is not None]
        return Claimed(_chained(found), len(told) - len(found))


def _chained(turns: Sequence[Turn]) -> list[Turn]:
    """Turns of which only the ids are known, each with the longest one before it that its prompt starts with."""
    chained: list[Turn] = []
    held: list[TokenIds] = []
    for turn in turns:
        extended = [index for index, ids in enumerate(held) if turn.prompt_ids[: len(ids)] == ids]
        parent = max(extended, key=lambda index: len(held[index]), default=None)
        cause = _why_no_parent(turn, chained) if chained and parent is None else None
        chained.append(replace(turn, parent=parent, cause=cause))
        held.append(turn.prompt_ids + turn.completion_ids)
    return chained


def _why_no_parent(turn: Turn, before: Sequence[Turn]) -> ForkCause:
    """The likeliest cause: what the messages were is not known any more."""
    if any(turn.prompt_ids == one.prompt_ids for one in before):
        return ForkCause.RESTARTED
    longest = max(len(one.prompt_ids) + len(one.completion_ids) for one in before)
    return ForkCause.COMPACTED if len(turn.prompt_ids) < longest else ForkCause.EDITED
