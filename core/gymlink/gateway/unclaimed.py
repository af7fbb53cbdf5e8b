"""What was sampled for calls that named no rollout, until one that came to know its ids claims it.

An agent that builds its own requests may drop a rollout's id. Where token ids travel through Gym, they come back with
its final response: they find here what was really sampled. Nothing is believed of them, and nothing is claimed twice.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

from gymlink.types import TokenIds, Turn

MAX_TOKENS: Final = 2**21
"""Sampled tokens that are remembered: about 150 MB. The oldest are forgotten first."""


class Unclaimed:
    """Turns that belong to no rollout yet, found by all their ids. Used from one event loop."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._turns: OrderedDict[bytes, deque[Turn]] = OrderedDict()
        self._max_tokens = max_tokens
        self._tokens = 0

    def add(self, turn: Turn) -> None:
        """Remember a turn. Its prompt is not kept: whoever claims the turn has to know it."""
        key = _key(turn.prompt_ids, turn.completion_ids)
        self._turns.setdefault(key, deque()).append(dataclasses.replace(turn, prompt_ids=(), parent=None, cause=None))
        self._turns.move_to_end(key)
        self._tokens += len(turn.completion_ids)
        while self._tokens > self._max_tokens:
            self._take(next(iter(self._turns)))

    def claim(self, prompt_ids: TokenIds, completion_ids: TokenIds) -> Turn | None:
        """The turn with these ids, which is forgotten with this. Its parent and cause are the claimant's to tell."""
        key = _key(prompt_ids, completion_ids)
        return dataclasses.replace(self._take(key), prompt_ids=prompt_ids) if key in self._turns else None

    def _take(self, key: bytes) -> Turn:
        same = self._turns[key]
        turn = same.popleft()
        if not same:
            del self._turns[key]
        self._tokens -= len(turn.completion_ids)
        return turn


def _key(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> bytes:
    digest = blake2b(array("q", prompt_ids), digest_size=16)
    digest.update(b"/")
    digest.update(array("q", completion_ids))
    return digest.digest()
