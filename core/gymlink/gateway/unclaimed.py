"""What was sampled for calls that named no rollout, until one that came to know its ids claims it.

An agent that builds its own requests may drop a rollout's id. Where token ids travel through Gym, they come back with
its final response: they find here what was really sampled. Nothing is believed of them, and nothing is claimed twice.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from hashlib import blake2b
from typing import Final

from gymlink.types import CallIds, TokenIds, Turn

MAX_TOKENS: Final = 2**21
"""Sampled tokens that are remembered: about 25 MB. The oldest are forgotten first."""


class Unclaimed:
    """Turns that belong to no rollout yet, found by all their ids. Used from one event loop."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._turns: OrderedDict[bytes, deque[Turn]] = OrderedDict()
        self._max_tokens = max_tokens
        self._tokens = 0

    def add(self, turn: Turn) -> None:
        """Remember a turn. Its prompt is not kept: whoever claims the turn has to know it."""
        key = _key(turn)
        bare = dataclasses.replace(turn, added_ids=TokenIds(), extends=None, cause=None, index=0)
        self._turns.setdefault(key, deque()).append(bare)
        self._turns.move_to_end(key)
        self._tokens += len(turn.completion_ids)
        while self._tokens > self._max_tokens:
            self._take(next(iter(self._turns)))

    def claim(self, ids: CallIds) -> Turn | None:
        """The turn with these ids, without its prompt. It is forgotten with this."""
        key = _key(ids)
        return self._take(key) if key in self._turns else None

    def _take(self, key: bytes) -> Turn:
        same = self._turns[key]
        turn = same.popleft()
        if not same:
            del self._turns[key]
        self._tokens -= len(turn.completion_ids)
        return turn


def _key(call: CallIds) -> bytes:
    digest = blake2b(digest_size=16)
    for one in call.branch:
        digest.update(one.added_ids.tobytes())
        digest.update(one.completion_ids.tobytes())
    digest.update(call.prompt_tokens.to_bytes(8, "little"))
    return digest.digest()
