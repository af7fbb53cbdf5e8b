"""`ScriptedEngine`: a public test double that samples what a script says, with real ids and plausible logprobs.

It lets anyone test an environment, an agent or a trainer's plumbing without a model: the script maps each prompt
to a completion, deterministically, and the engine keeps every call it got.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gymlink.errors import ContextOverflowError, EngineDownError, EngineError
from gymlink.types import FinishReason, Generation, Logprobs, Sampling, TokenIds

Script = Callable[[Sequence[int]], Sequence[int]]
"""From the ids of a prompt to the ids that the policy "samples"; may raise `EngineError`."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call that the engine got."""

    prompt_ids: TokenIds
    sampling: Sampling
    rollout_id: str


@dataclass
class ScriptedEngine:
    """An `Engine` that follows a script.

    The logprob of an id is `-(id % 97 + 1) / 97`: the same id always has the same one, so a test can recompute it.
    `latency_s` is slept before each answer. `weight_version` may be set by the test at any time; `loaded` keeps the
    folders that it was to load, with their versions. It is a `ServedEngine` too: `down` says that it cannot be reached.
    """

    script: Script
    max_context: int | None = None
    latency_s: float = 0.0
    weight_version: int = 0
    calls: list[Call] = field(default_factory=list)
    closed: bool = False
    loaded: list[tuple[str, int]] = field(default_factory=list)
    down: bool = False
    keep_calls: bool = True
    """Whether `calls` grows with use."""

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, stop_token_ids: Sequence[int], rollout_id: str
    ) -> Generation:
        if self.closed:
            raise EngineError("The scripted engine is closed.")
        self._reach()
        room = None if self.max_context is None else self.max_context - len(prompt_ids)
        if room is not None and room < 1:
            raise ContextOverflowError(len(prompt_ids), self.max_context or 0)
        if self.keep_calls:
            self.calls.append(Call(TokenIds(prompt_ids), sampling, rollout_id))
        version = self.weight_version
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
            self._reach()
        token_ids, finish_reason = self._cut(
            TokenIds(self.script(prompt_ids)), sampling.max_tokens, room, stop_token_ids
        )
        return Generation(
            token_ids,
            Logprobs(map(scripted_logprob, token_ids)),
            finish_reason,
            self.weight_version,
            oldest_weight_version=version if version != self.weight_version else None,
        )

    async def load_weights(self, path: str, version: int) -> None:
        self._reach()
        self.loaded.append((path, version))
        self.weight_version = version

    def set_weight_version(self, version: int) -> None:
        self.weight_version = version

    async def ping(self) -> None:
        self._reach()

    async def probe(self) -> int:
        self._reach()
        return self.weight_version

    def _reach(self) -> None:
        if self.down:
            raise EngineDownError("The scripted engine is down.")

    @staticmethod
    def _cut(
        token_ids: TokenIds, max_tokens: int | None, room: int | None, stop_token_ids: Sequence[int]
    ) -> tuple[TokenIds, FinishReason]:
        stop = next((at for at, token in enumerate(token_ids) if token in stop_token_ids), None)
        if stop is not None:
            token_ids = token_ids[: stop + 1]
        limit = min((n for n in (max_tokens, room) if n is not None), default=len(token_ids))
        if len(token_ids) > limit:
            return token_ids[:limit], "length"
        return token_ids, "stop"

    async def aclose(self) -> None:
        self.closed = True


def scripted_logprob(token_id: int) -> float:
    """The logprob that `ScriptedEngine` reports for an id."""
    return -(token_id % 97 + 1) / 97
