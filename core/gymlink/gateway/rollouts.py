"""The rollouts that are open at the gateway: what each has sampled, and the calls it has in flight.

Invariant: what a rollout has sampled is the sum of its turns and of what it counts as undelivered, at every moment that
another task can see. Nothing is added to a rollout that was closed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from gymlink.align import PromptPlan, RolloutRecord
from gymlink.gateway.call import Call, Thread
from gymlink.types import Generation, Message, Sampling, Turn


@dataclass
class OpenRollout:
    """One rollout while it runs."""

    record: RolloutRecord
    sampling: Sampling
    sampled_tokens: int = 0
    undelivered: Counter[str] = field(default_factory=Counter)
    """Sampled tokens that became no turn, by reason."""
    seconds_in_model: float = 0.0
    engine_error: str | None = None
    overflowed: bool = False
    closed: bool = False
    stranger: bool = False
    """Whether it is only the memory of a conversation that named no rollout."""
    threads: dict[str, Thread] = field(default_factory=dict)
    """Conversations that a call may go on with, by the key of their last answer."""
    _threads: dict[int, Thread] = field(default_factory=dict)
    """The same and those that nobody may name, by the index of the turn that answered."""
    _calls: set[asyncio.Task[Generation]] = field(default_factory=set)

    async def sample(self, generating: Coroutine[Any, Any, Generation]) -> Generation:
        """Await the engine for this rollout.

        Raises:
            RolloutClosedError: the rollout was closed and the generation cancelled. A generation that had just ended
                by then is still returned: whoever uses it looks at `closed`.
        """
        call = asyncio.create_task(generating)
        self._calls.add(call)
        try:
            return await call
        except asyncio.CancelledError:
            call.cancel()
            if self.closed:
                raise RolloutClosedError from None
            raise
        finally:
            self._calls.discard(call)

    def remember(self, key: str, call: Call, plan: PromptPlan, turn: Turn, answer: Message) -> None:
        """Let a later call go on from this answer, if the call was one of a conversation that may.

        An agent that sends its whole history is remembered with what it adds to the turn that its prompt extends, where
        the messages before are those of that turn's conversation, its answer included.
        """
        if (thread := call.thread) is None:
            return
        instructions = len(call.messages) - thread.length
        earlier = self._threads.get(-1 if turn.parent is None else turn.parent)
        if thread.extends is None and earlier is not None and earlier.length == plan.matched - instructions:
            thread = Thread(call.messages[plan.matched :], earlier)
        self._threads[turn.index] = Thread((answer,), thread)
        if call.is_stored:
            self.threads[key] = self._threads[turn.index]

    def close(self) -> None:
        """Cancel what is in flight."""
        self.closed = True
        for call in tuple(self._calls):
            call.cancel()


class RolloutClosedError(Exception):
    """A call was made for a rollout that has ended."""


class OpenRollouts:
    """All rollouts that are open, by id. Used from one event loop."""

    def __init__(self) -> None:
        self._open: dict[str, OpenRollout] = {}

    def open(self, rollout_id: str, rollout: OpenRollout) -> OpenRollout:
        if rollout_id in self._open:
            raise ValueError(f"The rollout {rollout_id!r} is open already.")
        self._open[rollout_id] = rollout
        return rollout

    def find(self, rollout_id: str) -> OpenRollout | None:
        return self._open.get(rollout_id)

    def close(self, rollout_id: str) -> OpenRollout:
        """Take the rollout out. Its calls in flight are cancelled: nothing is sampled for it any more."""
        rollout = self._open.pop(rollout_id)
        rollout.close()
        return rollout

    def __len__(self) -> int:
        return len(self._open)
