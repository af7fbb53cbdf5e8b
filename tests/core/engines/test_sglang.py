"""`SglangEngine` against SGLang's contract, written down from its source: no SGLang server runs on a CPU from PyPI.

`sglang_contract` says which command was tried, what came of it, and where each part of the contract is from.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gymlink.engines import SglangEngine
from gymlink.errors import ContextOverflowError, EngineDownError, EngineError
from gymlink.testing import EngineContract
from gymlink.types import Generation, Sampling
from sglang_contract import EOS, SglangContract, logprob_of

Connect = Callable[..., SglangEngine]


@pytest.fixture
def server() -> SglangContract:
    return SglangContract()


@pytest.fixture
async def address(server: SglangContract) -> AsyncIterator[TestServer]:
    async with TestServer(server.app()) as running:
        yield running


@pytest.fixture
async def connect(address: TestServer) -> AsyncIterator[Connect]:
    made: list[SglangEngine] = []

    def connect(**how: Any) -> SglangEngine:
        made.append(SglangEngine(str(address.make_url("")), **how))
        return made[-1]

    yield connect
    for engine in made:
        await engine.aclose()


class TestSglangEngine(EngineContract):
    prompt = (5, 6, 7)
    vocab_size = 64

    @pytest.fixture
    async def engine(self, connect: Connect) -> SglangEngine:
        engine = connect()
        await engine.probe()
        return engine


async def ask(
    engine: SglangEngine, prompt: Sequence[int] = (5, 6, 7), stop: Sequence[int] = (9,), **how: Any
) -> Generation:
    return await engine.generate(prompt, Sampling(**how), stop_token_ids=stop, rollout_id="r")


async def test_how_it_is_asked(server: SglangContract, connect: Connect) -> None:
    await ask(connect(), temperature=0.7, top_p=0.9, top_k=20, min_p=0.1, max_tokens=8)
    assert server.asked == [
        {
            "input_ids": [5, 6, 7],
            "sampling_params": {
                "temperature": 0.7,
                "top_p": 0.9,
                "top_k": 20,
                "min_p": 0.1,
                "repetition_penalty": 1.0,
                "max_new_tokens": 8,
                "stop_token_ids": [9],
                "ignore_eos": False,
            },
            "return_logprob": True,
            "return_prompt_token_ids": True,
        }
    ]


async def test_what_is_off_is_off(server: SglangContract, connect: Connect) -> None:
    """0 is no top_k of SGLang's, and with ignore_eos it would heed no stop id either."""
    await ask(connect(), stop=())
    assert server.asked[0]["sampling_params"] == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_new_tokens": 128 - 6 - 3,
        "stop_token_ids": [],
        "ignore_eos": True,
    }


async def test_what_it_answers(connect: Connect) -> None:
    engine = connect()
    turns = await asyncio.gather(*(ask(engine) for _ in range(50)))
    for turn in turns:
        assert turn.logprobs == tuple(map(logprob_of, turn.token_ids))
        assert turn.finish_reason == ("stop" if turn.token_ids[-1] in {9, EOS} else "length")
        assert not {9, EOS} & set(turn.token_ids[:-1]), "the model's own end ends a turn too"
    assert {turn.finish_reason for turn in turns} == {"stop", "length"}
    assert {turn.token_ids[-1] for turn in turns if turn.finish_reason == "stop"} == {9, EOS}


async def test_routed_experts_are_asked_for_and_come_through_untouched(
    server: SglangContract, connect: Connect
) -> None:
    assert (await ask(connect())).routed_experts is None
    assert (await ask(connect(routed_experts=True))).routed_experts == "AAAAAAEAAAA="
    assert server.asked[1]["return_routed_experts"] is True


async def test_what_it_refuses_is_told_in_its_words(connect: Connect) -> None:
    with pytest.raises(EngineError, match=r"SGLang at http\S+ answered /generate with 400: temperature must be a non-"):
        await ask(connect(), temperature=-1.0)
    with pytest.raises(EngineError, match="greater than the vocab size"):
        await ask(connect(), [5000])


@pytest.mark.parametrize(("size", "told"), [(122, 122), (128, 128)])
async def test_an_overflow_that_only_the_server_knows_of(
    server: SglangContract, connect: Connect, monkeypatch: pytest.MonkeyPatch, size: int, told: int
) -> None:
    engine = connect()
    await engine.probe()
    assert engine.max_context == 122
    engine._max_context = 1000
    with pytest.raises(ContextOverflowError, match=f"context length is {told} tokens, and the messages are {size}"):
        await ask(engine, [5] * size)


async def test_a_key_is_sent(address: TestServer, server: SglangContract) -> None:
    seen = []

    @web.middleware
    async def see(request: web.Request, handler: Any) -> web.StreamResponse:
        seen.append(request.headers.get("Authorization"))
        answer: web.StreamResponse = await handler(request)
        return answer

    app = server.app()
    app.middlewares.append(see)
    async with TestServer(app) as running:
        engine = SglangEngine(str(running.make_url("")), api_key="secret")
        await ask(engine)
        await engine.aclose()
    assert set(seen) == {"Bearer secret"}


async def test_cancelling_closes_the_request(server: SglangContract, connect: Connect) -> None:
    server.steps_s = 0.05
    engine = connect()
    call = asyncio.create_task(ask(engine, stop=()))
    await until(lambda: server.running_now == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: server.running_now == 0)


async def test_new_weights_are_loaded_from_a_folder(server: SglangContract, connect: Connect) -> None:
    engine = connect()
    assert await engine.probe() == 0
    server.steps_s = 0.01
    spanning = asyncio.create_task(ask(engine, stop=(), max_tokens=40))
    await asyncio.sleep(0.1)
    await engine.load_weights("/models/new", 7)
    assert server.controlled == [
        ("/pause_generation", {"mode": "retract"}),
        ("/update_weights_from_disk", {"model_path": "/models/new", "weight_version": "7"}),
        ("/continue_generation", {}),
    ]
    assert (engine.weight_version, await engine.probe()) == (7, 7)
    turn = await spanning
    assert (turn.oldest_weight_version, turn.weight_version) == (0, 7)
    after = await ask(engine, max_tokens=1)
    assert (after.oldest_weight_version, after.weight_version) == (None, 7)


async def test_weights_that_cannot_be_loaded_change_nothing(server: SglangContract, connect: Connect) -> None:
    engine = connect()
    with pytest.raises(EngineError, match=r"Failed to update weights: no such folder.* are those of before"):
        await engine.load_weights("/models/none", 7)
    assert server.controlled[-1][0] == "/continue_generation"
    assert (await ask(engine)).weight_version == engine.weight_version == 0


async def test_the_version_is_the_servers_own(server: SglangContract, connect: Connect) -> None:
    """Whoever updates the weights tells it to SGLang, and every answer tells it to us."""
    engine = connect()
    server.version = "12"
    assert (await ask(engine, max_tokens=1)).weight_version == 12
    assert engine.weight_version == 12


async def test_a_version_that_the_trainer_names_is_told_to_the_server(server: SglangContract, connect: Connect) -> None:
    engine = connect()
    engine.set_weight_version(5)
    await engine.ping()
    assert server.controlled == [("/update_weight_version", {"new_version": "5", "abort_all_requests": False})]
    assert (await ask(engine, max_tokens=1)).weight_version == 5


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"meta_info": None}, "without meta_info"),
        ({"output_ids": [1]}, "gave logprobs of other ids"),
        ({"prompt_token_ids": [5, 6, 8]}, "differ from number 2 on"),
        ({"prompt_token_ids": None, "meta_info.prompt_tokens": 4}, "after 4 ids, and 3 were sent"),
        ({"output_ids": None}, "without token ids"),
        ({"meta_info.output_token_logprobs": None}, "without logprobs"),
        (
            {"meta_info.output_token_logprobs": [[None, 1, None], [-1.0, 2, None]], "output_ids": [1, 2]},
            "None for token",
        ),
        ({"meta_info.finish_reason": None}, "finish_reason None"),
        ({"meta_info.finish_reason": {"type": "surprise"}}, "finish_reason 'surprise'"),
    ],
)
async def test_an_answer_that_is_not_whole_is_an_error(
    server: SglangContract, connect: Connect, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], told: str
) -> None:
    sample = server._sample

    async def changed(body: dict[str, Any]) -> dict[str, Any]:
        answer = await sample(body)
        for path, value in change.items():
            *outer, name = path.split(".")
            (answer[outer[0]] if outer else answer)[name] = value
        return answer

    monkeypatch.setattr(server, "_sample", changed)
    with pytest.raises(EngineError, match=told):
        await ask(connect(), max_tokens=2)


async def test_an_aborted_call_keeps_what_it_sampled(
    server: SglangContract, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = server._sample

    async def aborted(body: dict[str, Any]) -> dict[str, Any]:
        answer = await sample(body)
        reason = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
        answer["meta_info"]["finish_reason"] = reason
        return answer

    monkeypatch.setattr(server, "_sample", aborted)
    turn = await ask(connect(), stop=(), max_tokens=3)
    assert (turn.finish_reason, len(turn.token_ids)) == ("abort", 3)


async def test_a_server_that_is_gone_is_down(address: TestServer, connect: Connect) -> None:
    engine = connect()
    await ask(engine)
    await address.close()
    with pytest.raises(EngineDownError, match=r"SGLang at http\S+ cannot be reached"):
        await ask(engine)


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not what():  # noqa: ASYNC110 - the server is another program's, as far as the engine knows
            await asyncio.sleep(0.01)
