"""`ServerEngine`: verl's own rollout servers as a gymlink engine, token in and token out.

Whatever verl serves works alike (vLLM, SGLang, TensorRT-LLM and what others register), and nothing of it is patched:
calls go through the `LLMServerClient` that verl hands to every agent loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from gymlink.errors import ContextOverflowError, EngineError
from gymlink.types import FinishReason, Generation, Logprobs, Sampling, TokenIds

ABORTED = frozenset({"abort", "aborted"})
OFF = -1
"""verl's `top_k` that keeps every token."""


class ServerClient(Protocol):
    """What this needs of verl's `LLMServerClient`."""

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> Any: ...


class ServerEngine:
    """An `Engine` over the servers behind `client`.

    `max_context` is what prompt and response may have together. The weight version is verl's global step, as the
    servers tell it. Cancelling a call stops waiting for it; the server finishes what it began.
    """

    def __init__(self, client: ServerClient, max_context: int) -> None:
        self._client = client
        self._max_context = max_context
        self._version = 0
        self._closed = False

    @property
    def max_context(self) -> int | None:
        return self._max_context

    @property
    def weight_version(self) -> int:
        return self._version

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, stop_token_ids: Sequence[int], rollout_id: str
    ) -> Generation:
        if self._closed:
            raise EngineError("The engine is closed.")
        room = self._max_context - len(prompt_ids)
        if room < 1:
            raise ContextOverflowError(len(prompt_ids), self._max_context)
        limit = min(room, sampling.max_tokens or room)
        params = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or OFF,
            "repetition_penalty": 1.0,
            "logprobs": True,
            "max_tokens": limit,
            "stop_token_ids": list(stop_token_ids),
        }
        if sampling.min_p:
            params["min_p"] = sampling.min_p
        try:
            output = await self._client.generate(
                request_id=rollout_id, prompt_ids=list(prompt_ids), sampling_params=params
            )
        except Exception as error:  # Ray passes on whatever a server, or the lack of one, raised
            raise EngineError(f"verl's rollout server failed: {type(error).__name__}: {error}") from error
        return self._generation(output, limit, stop_token_ids)

    def _generation(self, output: Any, limit: int, stop_token_ids: Sequence[int]) -> Generation:
        token_ids = TokenIds(map(int, output.token_ids))
        logprobs = Logprobs(map(float, output.log_probs or ()))
        if len(logprobs) != len(token_ids):
            raise EngineError(
                f"verl's rollout server returned {len(token_ids)} token ids with {len(logprobs)} logprobs: set "
                "actor_rollout_ref.rollout.calculate_log_probs=True, which +gymlink=gym does."
            )
        newest = output.extra_fields.get("max_global_steps")
        oldest = output.extra_fields.get("min_global_steps")
        self._version = self._version if newest is None else int(newest)
        return Generation(
            token_ids,
            logprobs,
            _finish_reason(output.stop_reason, token_ids, limit, stop_token_ids),
            weight_version=self._version,
            oldest_weight_version=None if oldest is None else int(oldest),
            routed_experts=output.routed_experts,
        )

    async def aclose(self) -> None:
        """The servers are verl's, and stay."""
        self._closed = True


def _finish_reason(told: str | None, token_ids: TokenIds, limit: int, stop_token_ids: Sequence[int]) -> FinishReason:
    """verl's servers tell of an abort, but most do not tell the end of a turn from the end of the room."""
    if told in ABORTED:
        return "abort"
    if token_ids and token_ids[-1] in stop_token_ids:
        return "stop"
    return "length" if told == "length" or len(token_ids) >= limit else "stop"
