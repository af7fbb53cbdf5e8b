"""The engine: token ids in, sampled token ids and logprobs out. Nothing here knows messages or text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from gymlink.types import Generation, Sampling


@runtime_checkable
class Engine(Protocol):
    """A policy that samples.

    `generate` is called from one event loop, many calls at a time. It samples from the current weights and says
    which (`Generation.weight_version`). It raises `gymlink.errors.EngineError` when it cannot, and
    `ContextOverflowError` when the prompt leaves no room; it never returns an invented token.
    """

    @property
    def max_context(self) -> int | None:
        """Tokens that prompt and completion may have together; None when the engine does not say."""

    @property
    def weight_version(self) -> int:
        """Counts weight updates: the version that a generation started now would report."""

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, stop_token_ids: Sequence[int], rollout_id: str
    ) -> Generation:
        """Sample after `prompt_ids` until one of `stop_token_ids`, `sampling.max_tokens` or the context's end.

        A sampled stop token is the last of the returned ids. Cancelling the call cancels the generation.
        `rollout_id` names who asks: an engine with several replicas keeps the calls of one rollout on one of them,
        where their common prefix is cached. A rollout may have several calls at a time.
        """

    async def aclose(self) -> None:
        """Release what the engine holds. Calling it twice is fine."""
