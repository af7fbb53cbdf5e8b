"""The engine: token ids in, sampled token ids and logprobs out. Nothing here knows messages or text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from gymlink.types import Generation, Sampling


@runtime_checkable
class Engine(Protocol):
    """A policy that samples.

    `generate` is called from one event loop, many calls at a time. It samples from the current weights and says
    which (`Generation.weight_version`). It raises `gymlink.errors.EngineError` when it cannot,
    `ContextOverflowError` when the prompt leaves no room, and `EngineDownError` when it is not there to be asked; it
    never returns an invented token.
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

        `stop_token_ids` say it all: where an engine can, the model's own end-of-sequence tokens end nothing unless they
        are among them. The token that ended a generation is the last of the returned ids, whatever it is. Cancelling
        the call cancels the generation. `rollout_id` names who asks: an engine with several replicas keeps the calls of
        one rollout on one of them, where their common prefix is cached. A rollout may have several calls at a time.
        """

    async def aclose(self) -> None:
        """Release what the engine holds. Calling it twice is fine."""


@runtime_checkable
class UpdatesWeights(Protocol):
    """What an engine may be able to do besides: have its weights replaced while it runs.

    A generation that spans an update says so: `Generation.oldest_weight_version` is the version that it began with,
    `weight_version` the one that it ended with.
    """

    async def load_weights(self, path: str, version: int) -> None:
        """Sample from the weights in the folder `path` from now on, as `version`.

        The folder is read where the engine runs, in the format in which the model was first loaded. Generations in
        flight go on with the new weights; no cached key or value outlives those that made it.

        Raises:
            EngineError: the weights could not be loaded. Which ones the engine has then, the message says.
        """

    def set_weight_version(self, version: int) -> None:
        """Count the weights that the trainer itself has just put into the engine as `version`."""


class ServedEngine(Engine, UpdatesWeights, Protocol):
    """An engine that runs elsewhere, and may be away: what `gymlink.engines.EnginePool` is made of."""

    async def ping(self) -> None:
        """Raise `EngineDownError` when it is not there. A busy one, or one whose weights are being replaced, is."""

    async def probe(self) -> int:
        """Ask whether it would answer now, and what it holds (`max_context` is known from then on).

        Returns:
            The weight version that it tells of itself; 0 when it tells none.

        Raises:
            EngineDownError: it would not answer.
            EngineError: it answers, and cannot be used as it is.
        """
