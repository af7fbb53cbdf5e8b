"""What engines on servers have in common: who is asked, how much room there is, and which weights sampled.

A subclass says how its server is asked (`_sample` and its like). Nothing that it answers is taken on trust:
each id has a finite logprob, and the prompt that was sampled after is the one that was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gymlink.engines.connection import AnsweredError, Connection
from gymlink.errors import ContextOverflowError, EngineDownError, EngineError
from gymlink.types import FinishReason, Generation, Logprobs, Sampling, TokenIds

BAD_REQUEST = 400
SERVER_ERROR = 500
NO_LOGPROB = -9999.0
"""What vLLM writes where JSON has no number: for minus infinity, and for a logprob that it did not compute."""
_OVERFLOW = re.compile(r"(?:context|model|allowed) length\D{0,8}(\d+)")
_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort", "repetition": "stop"}


@dataclass(frozen=True, slots=True)
class Sampled:
    """A server's answer, unchecked. `versions` are those of the first and the last weights, where it tells them."""

    token_ids: Any
    logprobs: Any
    finish_reason: Any
    routed_experts: Any = None
    versions: tuple[int, int] | None = None


class RemoteEngine(ABC):
    """An engine on a server, reached by HTTP.

    Args:
        url: the server's, with or without `/v1`.
        api_key: what the server asks for, if anything.
        max_context: tokens that prompt and completion may have together, where that is less than the server's limit or
            the server tells none.
        timeout_s: how long a generation may take; None for as long as the caller waits. A server that hangs is noticed
            by nothing else, unless the engine is in an `EnginePool`.
    """

    name: ClassVar[str]

    def __init__(
        self, url: str, *, api_key: str | None = None, max_context: int | None = None, timeout_s: float | None = None
    ) -> None:
        self._server = Connection(self.name, url, api_key=api_key, timeout_s=timeout_s)
        self._given_context = max_context
        self._max_context: int | None = None
        self._version = 0
        self._untold: int | None = None
        self._meeting = asyncio.Lock()
        self._updating = asyncio.Lock()
        self._closed = False

    def __str__(self) -> str:
        return self._server.who

    @property
    def max_context(self) -> int | None:
        """The server's limit, or the one that was given; None before the first call or `probe`."""
        return self._max_context

    @property
    def weight_version(self) -> int:
        return self._version

    def set_weight_version(self, version: int) -> None:
        """See `gymlink.engines.UpdatesWeights`. The server is told with the next `ping`, to be known by it later."""
        self._version = self._untold = version

    async def ping(self) -> None:
        """See `gymlink.engines.ServedEngine`."""
        await self._reach()
        if (version := self._untold) is None:
            return
        with contextlib.suppress(EngineError):  # it is there, and is told with the next one
            await self._tell(version)
            if self._untold == version:
                self._untold = None

    @abstractmethod
    async def probe(self) -> int:
        """See `gymlink.engines.ServedEngine`."""

    async def load_weights(self, path: str, version: int) -> None:
        """See `gymlink.engines.UpdatesWeights`. It goes on when the caller gives up: no server is left paused."""
        await asyncio.shield(self._load_in_turn(path, version))

    async def _load_in_turn(self, path: str, version: int) -> None:
        async with self._updating:
            await self._load(path, version)

    @abstractmethod
    async def _reach(self) -> None:
        """Ask for what the server answers without its engine."""

    @abstractmethod
    async def _tell(self, version: int) -> None:
        """Have the server keep the version, where it can."""

    @abstractmethod
    async def _load(self, path: str, version: int) -> None:
        """Have the server load the weights; called one at a time."""

    @abstractmethod
    async def _sample(self, prompt: TokenIds, limit: int, sampling: Sampling, stops: list[int]) -> Sampled:
        """Ask the server; raise `EngineError` when the answer is about another prompt."""

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, stop_token_ids: Sequence[int], rollout_id: str
    ) -> Generation:
        del rollout_id  # one replica
        if self._closed:
            raise EngineError(f"The engine on {self} is closed.")
        prompt = prompt_ids if isinstance(prompt_ids, TokenIds) else TokenIds(prompt_ids)
        limit = await self._room(len(prompt), sampling.max_tokens)
        before = self._version
        try:
            sampled = await self._sample(prompt, limit, sampling, list(stop_token_ids))
        except AnsweredError as error:
            raise await self._judged(error, len(prompt)) from error
        oldest, newest = sampled.versions or (before, self._version)
        self._version = max(self._version, newest)
        return self._generation(sampled, oldest, newest)

    async def aclose(self) -> None:
        """Close the connections, which ends what is being generated. The server stays."""
        self._closed = True
        await self._server.close()

    def _met(self, context: int | None, version: int) -> int:
        """Keep what the server tells of itself; its version counts until the trainer names one."""
        limits = [limit for limit in (context, self._given_context) if limit is not None]
        if not limits:
            raise EngineError(f"{self} does not tell how many tokens it can hold: give max_context.")
        if self._max_context is None:
            self._version = max(self._version, version)
        self._max_context = min(limits)
        return version

    async def _room(self, prompt_tokens: int, max_tokens: int | None) -> int:
        if self._max_context is None:
            async with self._meeting:  # many calls come at once, and one of them asks
                if self._max_context is None:
                    await self.probe()
        context = self._max_context or 0
        room = context - prompt_tokens
        if room < 1:
            raise ContextOverflowError(prompt_tokens, context)
        return room if max_tokens is None else min(room, max_tokens)

    async def _judged(self, error: AnsweredError, prompt_tokens: int) -> EngineError:
        """What an error answer means: a prompt that is too long, a dead server, or this call alone.

        A server whose engine has died answers 500 for a moment, and so does one that stumbles over one request: only
        asking again tells them apart.
        """
        if error.status == BAD_REQUEST and (limit := _OVERFLOW.search(error.said)):
            return ContextOverflowError(prompt_tokens, int(limit[1]))
        if error.status >= SERVER_ERROR:
            try:
                await self.probe()
            except EngineDownError as down:
                return EngineDownError(f"{error} It has died since: {down}")
        return EngineError(str(error))

    def _generation(self, sampled: Sampled, oldest: int, newest: int) -> Generation:
        token_ids, logprobs = sampled.token_ids, sampled.logprobs
        if not isinstance(token_ids, list) or not isinstance(logprobs, list):
            missing = "logprobs" if isinstance(token_ids, list) else "token ids"
            raise EngineError(f"{self} answered without {missing}, which training needs.")
        if len(token_ids) != len(logprobs):
            raise EngineError(f"{self} answered {len(token_ids)} token ids with {len(logprobs)} logprobs.")
        for at, (token, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
            if not isinstance(logprob, int | float) or not math.isfinite(logprob) or logprob <= NO_LOGPROB:
                raise EngineError(
                    f"{self} gave the logprob {logprob!r} for token {token!r}, number {at} of the completion: "
                    "a sampled token has a finite one."
                )
        reason = _REASONS.get(str(sampled.finish_reason))
        if reason is None:
            raise EngineError(f"{self} ended a generation with the finish_reason {sampled.finish_reason!r}.")
        try:
            packed = TokenIds(token_ids)
        except ValueError as error:
            raise EngineError(f"{self} answered with token ids that are none: {error}") from error
        return Generation(
            packed,
            Logprobs(map(float, logprobs)),
            reason,
            weight_version=newest,
            oldest_weight_version=oldest if oldest != newest else None,
            routed_experts=sampled.routed_experts,
        )

    def _same_prompt(self, sent: TokenIds, used: Any, count: Any) -> None:
        """Compare what the server says that it sampled after: the ids where it tells them, else their number."""
        if used is not None and used != sent.tolist():
            pairs = enumerate(zip(sent, used, strict=False))
            at = next((at for at, (mine, theirs) in pairs if mine != theirs), min(len(sent), len(used)))
            raise EngineError(
                f"{self} sampled after another prompt than the one that was sent: {len(sent)} ids were sent and "
                f"{len(used)} used, and they differ from number {at} on."
            )
        if used is None and count != len(sent):
            raise EngineError(f"{self} says that it sampled after {count!r} ids, and {len(sent)} were sent.")


def version_of(told: Any) -> int:
    """A weight version as servers keep it, which is a string: 0 when nothing, or no number, was ever set."""
    text = str(told)
    return int(text) if text.isdecimal() else 0
