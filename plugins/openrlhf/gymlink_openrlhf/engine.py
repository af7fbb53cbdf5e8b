"""`ActorEngine`: the vLLM of one of OpenRLHF's rollout actors as a gymlink engine, token in and token out.

It lives in that actor's own process and event loop, and calls the actor's own `generate` there: no call goes through
Ray, so none can wait for a free slot of the actor that waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from gymlink.errors import ContextOverflowError, EngineError
from gymlink.types import FinishReason, Generation, Logprobs, Sampling, TokenIds


class LlmEngine(Protocol):
    """What this needs of the `llm_engine` that OpenRLHF hands to an agent."""

    async def generate(self, prompt_token_ids: list[int], sampling_params: Any) -> Any: ...


class ActorEngine:
    """An `Engine` over `llm_engine`.

    `max_context` is what prompt and response may have together (OpenRLHF's `--data.max_len`). The weight version is
    always 0: OpenRLHF tells its engines none. Cancelling a call aborts it in vLLM.
    """

    def __init__(self, llm_engine: LlmEngine, max_context: int) -> None:
        self._llm = llm_engine
        self._max_context = max_context
        self._closed = False

    @property
    def max_context(self) -> int | None:
        return self._max_context

    @property
    def weight_version(self) -> int:
        return 0

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, stop_token_ids: Sequence[int], rollout_id: str
    ) -> Generation:
        del rollout_id  # one replica
        if self._closed:
            raise EngineError("The engine is closed.")
        room = self._max_context - len(prompt_ids)
        if room < 1:
            raise ContextOverflowError(len(prompt_ids), self._max_context)
        params = _params(sampling, min(room, sampling.max_tokens or room), stop_token_ids)
        try:
            output = await self._llm.generate(list(prompt_ids), params)
        except Exception as error:  # whatever vLLM raises
            raise EngineError(f"vLLM failed: {type(error).__name__}: {error}") from error
        if output is None or not output.outputs:
            raise EngineError("vLLM ended a generation without an output.")
        return _generation(output.outputs[0])

    async def aclose(self) -> None:
        """The vLLM is OpenRLHF's, and stays."""
        self._closed = True


def _params(sampling: Sampling, limit: int, stop_token_ids: Sequence[int]) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=limit,
        stop_token_ids=list(stop_token_ids),
        logprobs=0,  # of the sampled token alone
        detokenize=False,
        skip_special_tokens=False,
    )


def _generation(output: Any) -> Generation:
    token_ids = TokenIds(map(int, output.token_ids))
    if output.logprobs is None or len(output.logprobs) != len(token_ids):
        told = "none" if output.logprobs is None else len(output.logprobs)
        raise EngineError(f"vLLM returned {len(token_ids)} token ids with {told} logprobs.")
    logprobs = Logprobs(float(by_id[token].logprob) for token, by_id in zip(token_ids, output.logprobs, strict=True))
    return Generation(token_ids, logprobs, _finish_reason(output.finish_reason))


def _finish_reason(told: str | None) -> FinishReason:
    match told:
        case "stop" | "length" | "abort":
            return told
        case "repetition":
            return "stop"
    raise EngineError(f"vLLM ended a generation with the finish_reason {told!r}.")
