"""What was sampled for calls that name no rollout, so that the next turn of their conversation is exact too.

Conversations are told apart by how they begin; the memory is bounded, and what was not used for longest is forgotten
first. Nothing in it is trained by the gateway's own account.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from gymlink.align import canonical, digest
from gymlink.gateway.rollouts import OpenRollout
from gymlink.types import Message, Turn

MAX_CONVERSATIONS: Final = 1024
MAX_IDS: Final = 2**23
"""Ids that are held: about 64 MB with their logprobs, and as much again for the messages."""


class Strangers:
    """Used from one event loop.

    Args:
        new: makes the record of a conversation, which gets this name.
    """

    def __init__(
        self, new: Callable[[str], OpenRollout], *, conversations: int = MAX_CONVERSATIONS, ids: int = MAX_IDS
    ) -> None:
        self._new = new
        self._conversations, self._ids = conversations, ids
        self._held: OrderedDict[str, OpenRollout] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._total = 0

    def find(self, messages: Sequence[Message]) -> OpenRollout:
        """The record of the conversation that these messages belong to; a new one when there is none."""
        name = _opening(messages)
        if name not in self._held:
            self._held[name] = self._new(name)
            self._sizes[name] = 0
        self._held.move_to_end(name)
        self._forget()
        return self._held[name]

    def grew(self, stranger: OpenRollout, turn: Turn) -> None:
        """A turn was added to the record of a conversation."""
        name = stranger.record.rollout_id
        if self._held.get(name) is stranger:
            added = len(turn.added_ids) + len(turn.completion_ids)
            self._sizes[name] += added
            self._total += added
            self._forget()

    def _forget(self) -> None:
        while len(self._held) > self._conversations or self._total > self._ids:
            name, _ = self._held.popitem(last=False)
            self._total -= self._sizes.pop(name)


def _opening(messages: Sequence[Message]) -> str:
    """Names a conversation by its messages up to and with the first that is not the system's."""
    opening = []
    for message in messages:
        form = canonical(message)
        opening.append([form.role, form.content])
        if form.role != "system":
            break
    return "stranger-" + digest(opening).hex()
