"""`VllmEngine` on a real `vllm serve`: the contract over both endpoints, and its logprobs against a plain forward."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
import torch

from gymlink.engines import VllmEngine
from gymlink.engines.vllm import Endpoint
from gymlink.errors import EngineDownError, EngineError
from gymlink.testing import EngineContract
from gymlink.types import Generation, Sampling
from vllm_server import VllmServer

pytestmark = [pytest.mark.slow]

VOCABULARY = 316
EOS = 2
PROMPT = (5, 6, 7, 8, 9)
LARGEST_ERROR = 2e-5
"""Of a logprob; measured: 1e-6."""


@pytest.fixture(params=["generate", "completions"])
async def engine(request: pytest.FixtureRequest, server: VllmServer) -> AsyncIterator[VllmEngine]:
    endpoint: Endpoint = request.param
    engine = VllmEngine(server.url, endpoint=endpoint)
    await engine.probe()
    yield engine
    await engine.aclose()


class TestVllmEngine(EngineContract):
    prompt = PROMPT
    vocab_size = VOCABULARY


async def ask(engine: VllmEngine, prompt: Sequence[int] = PROMPT, stop: Sequence[int] = (), **how: float) -> Generation:
    sampling = Sampling(**how)  # type: ignore[arg-type]
    return await engine.generate(prompt, sampling, stop_token_ids=stop, rollout_id="r")


def largest_error(model: Any, prompt: Sequence[int], said: Generation) -> float:
    """The largest difference between the logprobs of a generation and those of a plain forward pass."""
    with torch.no_grad():
        logprobs = model.network(torch.tensor([[*prompt, *said.token_ids]])).logits[0].log_softmax(-1)
    expected = logprobs[torch.arange(len(said.token_ids)) + len(prompt) - 1, torch.tensor(said.token_ids)]
    return float((expected - torch.tensor(said.logprobs)).abs().max())


async def test_what_the_server_holds_is_read_from_it(server: VllmServer) -> None:
    engine = VllmEngine(server.url + "/v1/")
    assert engine.max_context is None
    assert await engine.probe() == 0
    assert engine.max_context == 1024
    assert (await ask(engine, max_tokens=1)).finish_reason == "length"
    await engine.aclose()


async def test_the_logprobs_are_those_of_the_model(engine: VllmEngine, models: Any) -> None:
    prompts = [range(3, 3 + size) for size in (1, 5, 17, 60)]
    turns = await asyncio.gather(*(ask(engine, prompt, max_tokens=60) for prompt in prompts))
    errors = [largest_error(models[0], prompt, turn) for prompt, turn in zip(prompts, turns, strict=True)]
    print(f"\nlargest logprob errors: {errors}")
    assert max(errors) < LARGEST_ERROR
    assert min(min(turn.logprobs) for turn in turns) < -5


async def test_a_later_turn_extends_an_earlier_one(engine: VllmEngine, models: Any) -> None:
    first = await ask(engine, max_tokens=20)
    longer = [*PROMPT, *first.token_ids, 11, 12, 13]
    second = await ask(engine, longer, max_tokens=20)
    assert largest_error(models[0], longer, second) < LARGEST_ERROR, "also where the prefix was cached"


async def test_stop_ids_alone_end_a_turn(engine: VllmEngine) -> None:
    """The model's own end of sequence (id 2) ends nothing here; an id that stops is last, and has its logprob."""
    many = await asyncio.gather(*(ask(engine, [EOS] * size, max_tokens=100) for size in range(1, 20)))
    assert any(EOS in turn.token_ids[:-1] for turn in many)
    assert {turn.finish_reason for turn in many} == {"length"}

    stops = range(3, 60)
    for turn in await asyncio.gather(*(ask(engine, stop=stops, max_tokens=100) for _ in range(10))):
        assert turn.finish_reason == "stop"
        assert turn.token_ids[-1] in stops
        assert not set(turn.token_ids[:-1]) & set(stops)


async def test_how_the_trainer_samples_is_how_vllm_samples(engine: VllmEngine) -> None:
    greedy = await asyncio.gather(*(ask(engine, temperature=0.0, max_tokens=20) for _ in range(4)))
    assert len({turn.token_ids for turn in greedy}) == 1
    only_best = await asyncio.gather(*(ask(engine, top_k=1, max_tokens=20) for _ in range(4)))
    assert {turn.token_ids for turn in only_best} == {greedy[0].token_ids}
    free = await asyncio.gather(*(ask(engine, max_tokens=20) for _ in range(8)))
    assert len({turn.token_ids for turn in free}) == 8
    narrow = await asyncio.gather(*(ask(engine, top_p=1e-6, max_tokens=20) for _ in range(2)))
    assert {turn.token_ids for turn in narrow} == {greedy[0].token_ids}
    assert {(await ask(engine, min_p=1.0, max_tokens=20)).token_ids} == {greedy[0].token_ids}


async def test_a_cancelled_call_is_aborted_in_vllm(engine: VllmEngine, server: VllmServer) -> None:
    before = await asyncio.to_thread(server.sampled)
    calls = [asyncio.create_task(ask(engine, max_tokens=900)) for _ in range(64)]
    await until(lambda: server.running() > 0)
    for call in calls:
        call.cancel()
    cancelled = time.monotonic()
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert any(isinstance(one, asyncio.CancelledError) for one in ended)
    await until(lambda: server.running() == 0)
    seconds, tokens = time.monotonic() - cancelled, await asyncio.to_thread(server.sampled) - before
    print(f"\nidle {seconds:.2f} s after it, with {tokens} tokens of {64 * 900} sampled")
    assert tokens < 64 * 900 / 2
    assert len((await ask(engine, max_tokens=2)).token_ids) == 2


async def test_a_pause_holds_calls_back_or_aborts_them(engine: VllmEngine, server: VllmServer) -> None:
    calls = [asyncio.create_task(ask(engine, max_tokens=900)) for _ in range(8)]
    await until(lambda: server.running() > 0)
    await asyncio.to_thread(server.post, "/pause?mode=abort")
    cut = await asyncio.gather(*calls)
    assert "abort" in {turn.finish_reason for turn in cut}
    assert all(len(turn.token_ids) == len(turn.logprobs) for turn in cut)

    held = asyncio.create_task(ask(engine, max_tokens=4))
    await asyncio.sleep(0.5)
    assert not held.done()
    await asyncio.to_thread(server.post, "/resume")
    assert len((await held).token_ids) == 4


async def test_a_server_that_sleeps_is_down_and_not_waited_for(server: VllmServer) -> None:
    """vLLM lets a request to a paused or sleeping server wait for ever."""
    engine = VllmEngine(server.url, timeout_s=0.5)
    await engine.probe()
    await asyncio.to_thread(server.post, "/pause?mode=keep")
    try:
        with pytest.raises(EngineDownError, match=r"did not answer .* within 0\.\d s: it hangs, is asleep or paused"):
            await ask(engine, max_tokens=4)
    finally:
        await asyncio.to_thread(server.post, "/resume")
    assert len((await ask(engine, max_tokens=4)).token_ids) == 4
    await engine.aclose()


@pytest.mark.parametrize(
    ("how", "stop", "said"),
    [({"temperature": -3.0}, (), "temperature must be non-negative"), ({}, (400,), "out-of-vocab token ids")],
)
async def test_what_vllm_refuses_is_told_in_its_words(
    engine: VllmEngine, how: dict[str, float], stop: Sequence[int], said: str
) -> None:
    with pytest.raises(EngineError, match=f"vLLM at http.* with 400: .*{said}"):
        await ask(engine, stop=stop, **how)
    with pytest.raises(EngineError, match=r"with 400: .*out of vocab"):
        await ask(engine, [5000])


async def test_a_model_that_is_not_served_is_named(server: VllmServer) -> None:
    engine = VllmEngine(server.url, model="large")
    with pytest.raises(EngineError, match="serves no model 'large'; it serves: 'tiny'"):
        await engine.probe()
    await engine.aclose()


async def test_vllm_keeps_the_version_that_the_trainer_names(server: VllmServer) -> None:
    engine = VllmEngine(server.url)
    try:
        for version in (3, 0):
            engine.set_weight_version(version)
            await engine.ping()
            assert await engine.probe() == version
    finally:
        await engine.aclose()


async def test_new_weights_are_loaded_from_a_folder(engine: VllmEngine, server: VllmServer, models: Any) -> None:
    """Also for what is in flight: it goes on with the new weights, from keys and values made anew."""
    old, new = models
    cached = list(range(3, 60))
    before = await ask(engine, cached, max_tokens=20)
    assert largest_error(old, cached, before) < LARGEST_ERROR < largest_error(new, cached, before)

    spanning = asyncio.create_task(ask(engine, max_tokens=900))
    await until(lambda: server.running() > 0)
    await engine.load_weights(str(new.folder), 7)
    try:
        turn = await spanning
        assert (turn.oldest_weight_version, turn.weight_version) == (0, 7)
        assert not spans_one(turn, old, new)
        after = await ask(engine, cached, max_tokens=20)
        assert (after.oldest_weight_version, after.weight_version, engine.weight_version) == (None, 7, 7)
        assert largest_error(new, cached, after) < LARGEST_ERROR < largest_error(old, cached, after)
        assert await engine.probe() == 7
    finally:
        await engine.load_weights(str(old.folder), 0)
    assert largest_error(old, cached, await ask(engine, cached, max_tokens=20)) < LARGEST_ERROR


def spans_one(turn: Generation, *models: Any) -> bool:
    """Whether the whole turn was sampled with the weights of one of these."""
    return min(largest_error(model, PROMPT, turn) for model in models) < LARGEST_ERROR


async def until(what: Callable[[], bool], patience_s: float = 30.0) -> None:
    """Wait until `what()` holds; it may block."""
    deadline = time.monotonic() + patience_s
    while not await asyncio.to_thread(what):
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.01)
