"""The rollouts of one prompt wait for each other, so that a group is judged whole.

It is for trainers that run the siblings of a prompt in one process and take a group when the last of them has ended:
there, waiting delays nothing.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field
from typing import Any

from gymlink.types import Rollout


@dataclass
class Group:
    """The siblings of one prompt. `ended` holds a rollout for each that has one, in the order in which they ended.

    `settled` is free for whoever judges the group: what was worked out about it, once.
    """

    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    members: int = 0
    left: int = 0
    ended: list[Rollout] = field(default_factory=list)
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    settled: asyncio.Future[Any] | None = None

    @property
    def scored(self) -> list[Rollout]:
        return [rollout for rollout in self.ended if rollout.reward is not None]


class Siblings:
    """All groups that are running, by a name of the trainer's. Used from one event loop."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}

    def join(self, uid: str) -> Group:
        """One more sibling begins. All of a prompt's join before the first of them ends."""
        group = self._groups.setdefault(uid, Group())
        group.members += 1
        return group

    def leave(self, uid: str, rollout: Rollout | None) -> None:
        """A sibling has ended, with a rollout or by an error."""
        group = self._groups[uid]
        group.left += 1
        if rollout is not None:
            group.ended.append(rollout)
        if group.left == group.members:
            del self._groups[uid]
            group.complete.set()
