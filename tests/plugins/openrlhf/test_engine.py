"""The vLLM of a rollout actor as an engine: what it is asked, and what becomes of its answers.

vLLM's own types on both sides; between them an answer that is told. A test with a running vLLM is elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput

from gymlink.engines import Engine
from gymlink.errors import ContextOverflowError, EngineError
from gymlink.types import Generation, Sampling
from gymlink_openrlhf.engine import ActorEngine

CONTEXT = 10


class Actor:
    """Stands where OpenRLHF's `RolloutRayActor` stands, which an agent is handed as `llm_engine`."""

    def __init__(self, answer: RequestOutput | Exception | None) -> None:
        self.answer = answer
        self.asked: list[tuple[Any, SamplingParams]] = []

    async def generate(self, prompt_token_ids: list[int], sampling_params: SamplingParams) -> RequestOutput | None:
        self.asked.append((prompt_token_ids, sampling_params))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def output(
    ids: Sequence[int] = (5, 6), reason: str | None = "stop", logprobs: Sequence[float] | None = (-0.5, -0.25)
) -> RequestOutput:
    by_id = None if logprobs is None else [{one: Logprob(logprob=at)} for one, at in zip(ids, logprobs, strict=False)]
    made = CompletionOutput(0, "", list(ids), None, by_id, finish_reason=reason)
    return RequestOutput("0", None, [1, 2], None, [made], finished=True)


def engine(answer: RequestOutput | Exception | None = None) -> tuple[Engine, Actor]:
    actor = Actor(answer or output())
    return ActorEngine(actor, CONTEXT), actor


async def ask(engine: Engine, prompt: Sequence[int] = (1, 2), **sampling: Any) -> Generation:
    return await engine.generate(prompt, Sampling(**sampling), stop_token_ids=[7, 8], rollout_id="0.r")


async def test_how_vllm_is_asked() -> None:
    asking, actor = engine()
    await ask(asking, temperature=0.7, top_p=0.9, top_k=20, min_p=0.1, max_tokens=3)
    [(prompt, params)] = actor.asked
    assert (prompt, type(prompt)) == ([1, 2], list)
    assert params == SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=20,
        min_p=0.1,
        max_tokens=3,
        stop_token_ids=[7, 8],
        logprobs=0,
        detokenize=False,
        skip_special_tokens=False,
    )
    assert params.n == 1
    assert not params.ignore_eos


async def test_what_is_off_is_off_in_vllm() -> None:
    asking, actor = engine()
    await ask(asking)
    [(_, params)] = actor.asked
    neutral = SamplingParams()
    assert (params.top_k, params.top_p, params.min_p) == (neutral.top_k, neutral.top_p, neutral.min_p)
    assert (params.temperature, params.repetition_penalty, params.min_tokens) == (1.0, 1.0, 0)


@pytest.mark.parametrize(("wanted", "limit"), [(None, 8), (3, 3), (50, 8)])
async def test_prompt_and_response_fit_the_context(wanted: int | None, limit: int) -> None:
    asking, actor = engine()
    assert asking.max_context == CONTEXT
    await ask(asking, max_tokens=wanted)
    assert actor.asked[0][1].max_tokens == limit


async def test_one_token_of_room_is_enough_and_none_is_not() -> None:
    asking, actor = engine()
    await ask(asking, range(CONTEXT - 1))
    assert actor.asked[0][1].max_tokens == 1
    for size in (CONTEXT, CONTEXT + 1):
        with pytest.raises(ContextOverflowError, match=rf"context length is 10 tokens, and the messages are {size}"):
            await ask(asking, range(size))
    assert len(actor.asked) == 1


async def test_what_vllm_answers() -> None:
    generation = await ask(engine()[0])
    assert generation == Generation((5, 6), (-0.5, -0.25), "stop", weight_version=0)
    assert engine()[0].weight_version == 0


async def test_the_logprob_of_the_sampled_token_is_taken() -> None:
    """vLLM may tell of likelier ones beside it."""
    answer = output((5,), logprobs=(-2.0,))
    answer.outputs[0].logprobs = [{3: Logprob(-0.1), 5: Logprob(-2.0), 4: Logprob(-0.3)}]
    assert (await ask(engine(answer)[0])).logprobs == (-2.0,)


@pytest.mark.parametrize(
    ("told", "meant"), [("stop", "stop"), ("length", "length"), ("abort", "abort"), ("repetition", "stop")]
)
async def test_why_a_turn_ended(told: str, meant: str) -> None:
    assert (await ask(engine(output(reason=told))[0])).finish_reason == meant


@pytest.mark.parametrize("told", ["error", None, "a new one"])
async def test_an_end_that_is_none_is_an_error(told: str | None) -> None:
    with pytest.raises(EngineError, match=f"finish_reason {told!r}"):
        await ask(engine(output(reason=told))[0])


async def test_nothing_sampled_is_nothing() -> None:
    """An aborted request may have no token."""
    assert await ask(engine(output((), "abort", ()))[0]) == Generation((), (), "abort")


@pytest.mark.parametrize(("logprobs", "told"), [(None, "none"), ((-0.5,), "1")])
async def test_missing_logprobs_are_an_error(logprobs: Sequence[float] | None, told: str) -> None:
    with pytest.raises(EngineError, match=f"2 token ids with {told} logprobs"):
        await ask(engine(output(logprobs=logprobs))[0])


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("too long"), TimeoutError("late")])
async def test_whatever_vllm_raises_is_the_engines(error: Exception) -> None:
    with pytest.raises(EngineError, match=f"vLLM failed: {type(error).__name__}: {error}") as caught:
        await ask(engine(error)[0])
    assert caught.value.__cause__ is error


async def test_no_output_is_an_error() -> None:
    empty = output()
    empty.outputs = []
    for answer in (None, empty):
        with pytest.raises(EngineError, match="without an output"):
            await ask(ActorEngine(Actor(answer), CONTEXT))


async def test_a_cancelled_call_is_cancelled() -> None:
    """vLLM aborts a request whose caller is cancelled: the cancellation must reach it, and be no error."""
    reached = asyncio.Event()

    class Slow(Actor):
        async def generate(self, prompt_token_ids: list[int], sampling_params: SamplingParams) -> RequestOutput | None:
            try:
                await asyncio.sleep(60)
            finally:
                reached.set()
            return None

    call = asyncio.create_task(ask(ActorEngine(Slow(None), CONTEXT)))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert reached.is_set()


async def test_a_closed_engine_asks_nothing() -> None:
    asking, actor = engine()
    await asking.aclose()
    with pytest.raises(EngineError, match="closed"):
        await ask(asking)
    assert actor.asked == []
