"""`VllmEngine` and what all engines on servers share, against a server that answers as it is told.

The answers are those of vLLM 0.29.0, as a real one gave them; tests/engines asks a real one.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gymlink.engines import VllmEngine, vllm
from gymlink.errors import ContextOverflowError, EngineDownError, EngineError
from gymlink.types import Generation, Sampling

CONTEXT = 128
GENERATED: dict[str, Any] = {
    "request_id": "generate-tokens-8cf75617fadd456e",
    "model": "tiny",
    "choices": [
        {
            "index": 0,
            "logprobs": {
                "content": [
                    {"token": "token_id:58", "logprob": -5.5, "bytes": None, "top_logprobs": []},
                    {"token": "token_id:120", "logprob": -0.25, "bytes": None, "top_logprobs": []},
                ]
            },
            "finish_reason": "length",
            "token_ids": [58, 120],
            "routed_experts": None,
        }
    ],
    "usage": {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2},
}
COMPLETED: dict[str, Any] = {
    "id": "cmpl-8c51c31d05734f02",
    "choices": [
        {
            "index": 0,
            "text": " user",
            "logprobs": {"text_offset": [0, 0], "token_logprobs": [-5.5, -0.25], "tokens": ["token_id:58", "..."]},
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": [58, 120],
            "prompt_token_ids": [5, 6, 7],
            "routed_experts": None,
        }
    ],
    "usage": {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2},
}
EXPECTED = Generation((58, 120), (-5.5, -0.25), "length")


class Vllm:
    """A vLLM that answers what it is told: a body, a status and a body, or a handler, by path."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.answers: dict[str, Any] = {
            "/health": "",
            "/v1/models": {"data": [{"id": "tiny", "max_model_len": CONTEXT}, {"id": "lora", "max_model_len": None}]},
            "/weight_info": {"weight_version": "default"},
            "/is_sleeping": {"is_sleeping": False},
            "/inference/v1/generate": copy.deepcopy(GENERATED),
            "/v1/completions": copy.deepcopy(COMPLETED),
        }

    @property
    def body(self) -> Any:
        """What was asked last."""
        return self.asked[-1][1]

    @property
    def posted(self) -> list[str]:
        return [path for path, body in self.asked if body is not None]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path_qs
        self.headers = dict(request.headers)
        answer = self.answers.get(path, self.answers.get(request.path, (404, {"detail": "Not Found"})))
        if request.method == "GET":
            if request.path in {"/inference/v1/generate", "/v1/completions"} and not isinstance(answer, tuple):
                return web.json_response({"detail": "Method Not Allowed"}, status=405)
        else:
            self.asked.append((path, await request.json() if request.can_read_body else {}))
        if callable(answer):
            made: web.StreamResponse = await answer(request)
            return made
        status, body = answer if isinstance(answer, tuple) else (200, answer)
        return (
            web.Response(text=body, status=status) if isinstance(body, str) else web.json_response(body, status=status)
        )


Connect = Callable[..., VllmEngine]


@pytest.fixture
def server() -> Vllm:
    return Vllm()


@pytest.fixture
async def address(server: Vllm) -> AsyncIterator[TestServer]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    async with TestServer(app) as running:
        yield running


@pytest.fixture
async def connect(address: TestServer) -> AsyncIterator[Connect]:
    made: list[VllmEngine] = []

    def connect(**how: Any) -> VllmEngine:
        made.append(VllmEngine(str(address.make_url("")), **how))
        return made[-1]

    yield connect
    for engine in made:
        await engine.aclose()


async def ask(engine: VllmEngine, prompt: tuple[int, ...] = (5, 6, 7), **how: Any) -> Generation:
    return await engine.generate(prompt, Sampling(**how), stop_token_ids=(2, 0), rollout_id="r")


# --- How it is asked ------------------------------------------------------------------------------------------------

ASKED: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "repetition_penalty": 1.0,
    "max_tokens": 8,
    "stop_token_ids": [2, 0],
    "ignore_eos": True,
    "logprobs": 0,
}
HOW = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "max_tokens": 8}


async def test_ids_are_asked_of_the_endpoint_that_takes_them(server: Vllm, connect: Connect) -> None:
    engine = connect()
    assert await ask(engine, **HOW) == EXPECTED
    assert server.asked == [
        ("/inference/v1/generate", {"token_ids": [5, 6, 7], "sampling_params": {**ASKED, "detokenize": False}})
    ]


async def test_else_of_completions(server: Vllm, connect: Connect) -> None:
    server.answers["/inference/v1/generate"] = (404, {"detail": "Not Found"})
    engine = connect(model="lora", api_key="k")
    assert await ask(engine, **HOW) == EXPECTED
    asked = {
        "model": "lora",
        "prompt": [5, 6, 7],
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        **ASKED,
    }
    assert server.asked == [("/v1/completions", asked)]
    assert server.headers["Authorization"] == "Bearer k"


async def test_what_is_off_is_off_and_no_seed_is_sent(server: Vllm, connect: Connect) -> None:
    await ask(connect())
    params = server.body["sampling_params"]
    assert {name: params[name] for name in ("temperature", "top_p", "top_k", "min_p")} == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
    }
    assert "seed" not in params


@pytest.mark.parametrize(("wanted", "limit"), [(None, 125), (3, 3), (500, 125)])
async def test_prompt_and_completion_fit_the_context(
    server: Vllm, connect: Connect, wanted: int | None, limit: int
) -> None:
    await ask(connect(), max_tokens=wanted)
    assert server.body["sampling_params"]["max_tokens"] == limit


async def test_the_smaller_context_counts(connect: Connect) -> None:
    for given, expected in ((64, 64), (4096, CONTEXT), (None, CONTEXT)):
        engine = connect(max_context=given)
        assert engine.max_context is None
        await engine.probe()
        assert engine.max_context == expected


async def test_the_server_is_met_once(server: Vllm, connect: Connect) -> None:
    met = 0

    async def models(_: web.Request) -> web.Response:
        nonlocal met
        met += 1
        await asyncio.sleep(0.05)
        return web.json_response({"data": [{"id": "tiny", "max_model_len": CONTEXT}]})

    server.answers["/v1/models"] = models
    engine = connect()
    await asyncio.gather(*(ask(engine) for _ in range(20)))
    assert met == 1


# --- What is taken of its answers -----------------------------------------------------------------------------------


@pytest.fixture(params=["generate", "completions"])
def endpoint(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def answer(server: Vllm, endpoint: str) -> dict[str, Any]:
    """The answer of either endpoint, to be changed."""
    made: dict[str, Any] = server.answers["/inference/v1/generate" if endpoint == "generate" else "/v1/completions"]
    return made


def with_logprobs(answer: dict[str, Any], *logprobs: object) -> None:
    told = answer["choices"][0]["logprobs"]
    if "content" in told:
        told["content"] = [{"token": "token_id:1", "logprob": one} for one in logprobs]
    else:
        told["token_logprobs"] = list(logprobs)


@pytest.mark.parametrize(
    ("told", "meant"), [("stop", "stop"), ("length", "length"), ("abort", "abort"), ("repetition", "stop")]
)
async def test_why_a_turn_ended(connect: Connect, endpoint: str, answer: dict[str, Any], told: str, meant: str) -> None:
    answer["choices"][0]["finish_reason"] = told
    assert (await ask(connect(endpoint=endpoint))).finish_reason == meant


async def test_an_aborted_call_may_have_no_token(connect: Connect, endpoint: str, answer: dict[str, Any]) -> None:
    answer["choices"][0] |= {"finish_reason": "abort", "token_ids": []}
    with_logprobs(answer)
    assert await ask(connect(endpoint=endpoint)) == Generation((), (), "abort")


async def test_routed_experts_come_through_untouched(connect: Connect, endpoint: str, answer: dict[str, Any]) -> None:
    """vLLM 0.29 refuses --enable-return-routed-experts on a CPU: "not supported with monolithic MoE kernel"."""
    answer["choices"][0]["routed_experts"] = "k05VTVBZAQB2AHsn"
    assert (await ask(connect(endpoint=endpoint))).routed_experts == "k05VTVBZAQB2AHsn"


@pytest.mark.parametrize("told", ["error", None, "a new one"])
async def test_an_end_that_is_none_is_an_error(
    connect: Connect, endpoint: str, answer: dict[str, Any], told: str | None
) -> None:
    answer["choices"][0]["finish_reason"] = told
    with pytest.raises(EngineError, match=f"finish_reason {told!r}"):
        await ask(connect(endpoint=endpoint))


@pytest.mark.parametrize("logprob", [None, -9999.0, "-1", float("-inf"), float("nan")])
async def test_a_logprob_that_is_none_is_an_error(
    connect: Connect, endpoint: str, answer: dict[str, Any], logprob: object
) -> None:
    """vLLM writes -9999.0 for one that it has not computed, and for minus infinity."""
    with_logprobs(answer, -1.0, logprob)
    with pytest.raises(EngineError, match=r"token 120, number 1 of the completion|not JSON"):
        await ask(connect(endpoint=endpoint))


async def test_one_logprob_for_each_id(connect: Connect, endpoint: str, answer: dict[str, Any]) -> None:
    with_logprobs(answer, -1.0)
    with pytest.raises(EngineError, match="2 token ids with 1 logprobs"):
        await ask(connect(endpoint=endpoint))
    answer["choices"][0]["logprobs"] = None
    with pytest.raises(EngineError, match="without logprobs"):
        await ask(connect(endpoint=endpoint))
    answer["choices"][0]["token_ids"] = None
    with pytest.raises(EngineError, match="without token ids"):
        await ask(connect(endpoint=endpoint))


async def test_the_prompt_that_was_used_is_the_one_that_was_sent(
    connect: Connect, endpoint: str, answer: dict[str, Any]
) -> None:
    answer["usage"]["prompt_tokens"] = 4
    if endpoint == "generate":  # which tells their number only
        with pytest.raises(EngineError, match="sampled after 4 ids, and 3 were sent"):
            await ask(connect(endpoint=endpoint))
    where = answer if endpoint == "generate" else answer["choices"][0]
    for used, at in (([1, 5, 6, 7], 0), ([5, 6, 8], 2), ([5, 6], 2)):
        answer["choices"][0]["prompt_token_ids"] = where["prompt_token_ids"] = used
        with pytest.raises(EngineError, match=f"{len(used)} used, and they differ from number {at} on"):
            await ask(connect(endpoint=endpoint))


async def test_completions_that_know_no_ids_are_an_error(connect: Connect, server: Vllm) -> None:
    del server.answers["/v1/completions"]["choices"][0]["prompt_token_ids"]
    with pytest.raises(EngineError, match="too old to know return_token_ids"):
        await ask(connect(endpoint="completions"))


@pytest.mark.parametrize("body", ["<html>", "[]", "{}", '{"choices": []}'])
async def test_what_is_no_answer_is_an_error(connect: Connect, server: Vllm, endpoint: str, body: str) -> None:
    server.answers["/inference/v1/generate"] = server.answers["/v1/completions"] = body
    with pytest.raises(EngineError, match=r"not JSON: <html>|without a choice"):
        await ask(connect(endpoint=endpoint))


# --- Refusals and failures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "temperature must be non-negative", "type": "BadRequestError", "code": 400}},
        {"error": "temperature must be non-negative"},
        {"detail": "temperature must be non-negative"},
        {"success": False, "message": "temperature must be non-negative"},
        "temperature must be non-negative",
    ],
)
async def test_what_it_refuses_is_told_in_its_words(connect: Connect, server: Vllm, body: object) -> None:
    server.answers["/inference/v1/generate"] = (400, body)
    with pytest.raises(EngineError, match=r"vLLM at http://\S+ answered /inf\S+ with 400: temperature must be") as told:
        await ask(connect(endpoint="generate"))
    assert type(told.value) is EngineError


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 128 tokens. However, you requested 14 output tokens and ...",
        "The decoder prompt (length 128) plus the number of requested output tokens (at least 1) is longer than the "
        "maximum model length of 128. Make sure that ...",
        "Input length (130) exceeds model's maximum context length (128).",
    ],
)
async def test_an_overflow_that_only_the_server_knows_of(connect: Connect, server: Vllm, said: str) -> None:
    server.answers["/v1/models"] = {"data": [{"id": "tiny"}]}
    server.answers["/inference/v1/generate"] = (400, {"error": {"message": said}})
    with pytest.raises(ContextOverflowError, match="maximum context length is 128 tokens, and the messages are 3"):
        await ask(connect(endpoint="generate", max_context=1000))


async def test_a_prompt_without_room_is_not_sent(connect: Connect, server: Vllm) -> None:
    with pytest.raises(ContextOverflowError, match="context length is 128 tokens, and the messages are 128"):
        await ask(connect(), (5,) * CONTEXT)
    assert server.asked == []


async def test_a_context_that_nobody_tells_must_be_given(connect: Connect, server: Vllm) -> None:
    server.answers["/v1/models"] = {"data": [{"id": "tiny"}]}
    with pytest.raises(EngineError, match="give max_context"):
        await ask(connect())


async def test_a_model_that_is_not_served_is_named(connect: Connect) -> None:
    with pytest.raises(EngineError, match="serves no model 'large'; it serves: 'tiny', 'lora'"):
        await ask(connect(model="large"))


async def test_a_wrong_key_is_not_a_dead_server(connect: Connect, server: Vllm) -> None:
    server.answers["/v1/models"] = (401, {"error": "Unauthorized"})
    with pytest.raises(EngineError, match="with 401: Unauthorized") as told:
        await ask(connect())
    assert not isinstance(told.value, EngineDownError)


async def test_a_server_that_stumbles_over_one_call_is_not_down(connect: Connect, server: Vllm) -> None:
    server.answers["/inference/v1/generate"] = (500, {"error": {"message": "no kernel"}})
    with pytest.raises(EngineError, match="no kernel") as told:
        await ask(connect(endpoint="generate"))
    assert not isinstance(told.value, EngineDownError)


async def test_a_server_whose_engine_has_died_is_down(connect: Connect, server: Vllm) -> None:
    engine = connect(endpoint="generate")
    await engine.probe()
    server.answers["/inference/v1/generate"] = (500, {"error": {"message": "EngineCore encountered an issue."}})
    server.answers["/health"] = (503, "")
    with pytest.raises(EngineDownError, match=r"EngineCore encountered an issue.*has died since.*health with 503"):
        await ask(engine)


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_a_server_that_is_not_there_now_is_down(connect: Connect, server: Vllm, status: int) -> None:
    server.answers["/inference/v1/generate"] = (status, {"error": {"message": "the queue is full"}})
    with pytest.raises(EngineDownError, match=f"with {status}: the queue is full"):
        await ask(connect(endpoint="generate"))


async def test_a_connection_that_breaks_is_down(connect: Connect, server: Vllm, address: TestServer) -> None:
    async def hang_up(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    engine = connect(endpoint="generate")
    server.answers["/inference/v1/generate"] = hang_up
    with pytest.raises(EngineDownError, match="cannot be reached: Server disconnected"):
        await ask(engine)
    await address.close()
    with pytest.raises(EngineDownError, match="cannot be reached: Cannot connect"):
        await ask(engine)


async def test_a_server_that_hangs_is_down_after_the_time_that_was_given(connect: Connect, server: Vllm) -> None:
    async def hang(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    server.answers["/inference/v1/generate"] = hang
    with pytest.raises(EngineDownError, match=r"did not answer /inference/v1/generate within 0\.\d s: it hangs"):
        await ask(connect(endpoint="generate", timeout_s=0.2))


async def test_a_sleeping_server_is_down(connect: Connect, server: Vllm) -> None:
    server.answers["/is_sleeping"] = {"is_sleeping": True}
    with pytest.raises(EngineDownError, match=r"asleep.*POST /wake_up"):
        await connect().probe()


async def test_cancelling_closes_the_request(connect: Connect, server: Vllm) -> None:
    """vLLM aborts what it samples for a connection that was closed."""
    begun, closed = asyncio.Event(), asyncio.Event()

    async def sample(_: web.Request) -> web.StreamResponse:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            closed.set()
        raise AssertionError

    server.answers["/inference/v1/generate"] = sample
    call = asyncio.create_task(ask(connect(endpoint="generate")))
    await begun.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.wait_for(closed.wait(), 5)


async def test_a_closed_engine_asks_nothing(connect: Connect, server: Vllm) -> None:
    engine = connect()
    await engine.aclose()
    with pytest.raises(EngineError, match="closed"):
        await ask(engine)
    assert server.asked == []


# --- Weights --------------------------------------------------------------------------------------------------------


@pytest.fixture
def controlled(server: Vllm, monkeypatch: pytest.MonkeyPatch) -> Vllm:
    """One that was started with VLLM_SERVER_DEV_MODE=1."""
    monkeypatch.setattr(vllm, "DYING_S", 0.0)
    server.answers |= {
        "/pause": {"status": "paused"},
        "/collective_rpc": {"results": [None]},
        "/reset_prefix_cache": {"success": True},
        "/update_weight_version": {"success": True, "new_version": "7"},
        "/resume": {"status": "resumed"},
    }
    return server


async def test_an_update_holds_calls_back_and_forgets_what_was_cached(connect: Connect, controlled: Vllm) -> None:
    engine = connect(endpoint="generate")
    await engine.load_weights("/models/step-7", 7)
    assert controlled.asked == [
        ("/pause?mode=keep", {}),
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": "/models/step-7"}}),
        ("/reset_prefix_cache?reset_running_requests=true", {}),
        ("/update_weight_version", {"new_version": "7"}),
        ("/resume", {}),
    ]
    assert (engine.weight_version, (await ask(engine)).weight_version) == (7, 7)


async def test_the_version_that_a_server_tells(connect: Connect, server: Vllm) -> None:
    engine = connect()
    for told, version in (({"weight_version": "12"}, 12), ({"weight_version": "step-3"}, 0), ((404, ""), 0)):
        server.answers["/weight_info"] = told
        assert await engine.probe() == version


async def test_the_version_that_is_there_when_they_meet_is_taken_over(connect: Connect, server: Vllm) -> None:
    server.answers["/weight_info"] = {"weight_version": "12"}
    assert (await ask(connect())).weight_version == 12
    named = connect()
    named.set_weight_version(15)
    assert (await ask(named)).weight_version == 15


async def test_a_version_that_the_trainer_names_is_told_to_the_server(connect: Connect, controlled: Vllm) -> None:
    """So that it is known by it when it comes back; what keeps it from being told is no sign of death."""
    engine = connect()
    engine.set_weight_version(5)
    told = controlled.answers.pop("/update_weight_version")
    controlled.answers["/update_weight_version"] = (503, "busy")
    await engine.ping()
    controlled.answers["/update_weight_version"] = told
    for _ in range(3):
        await engine.ping()
    assert controlled.asked == [("/update_weight_version", {"new_version": "5"})] * 2


async def test_a_server_that_keeps_no_version_is_not_asked_to_for_ever(connect: Connect, server: Vllm) -> None:
    engine = connect()
    engine.set_weight_version(5)
    for _ in range(3):
        await engine.ping()
    assert [path for path, _ in server.asked] == ["/update_weight_version"]


async def test_a_ping_asks_nothing_of_an_engine_that_may_be_busy(connect: Connect, server: Vllm) -> None:
    server.answers = {"/health": ""}
    await connect().ping()
    server.answers = {"/health": (503, "")}
    with pytest.raises(EngineDownError, match="health with 503"):
        await connect().ping()


async def test_a_server_without_control_routes_says_how_to_have_them(connect: Connect) -> None:
    with pytest.raises(EngineError, match="has no /pause: start it with VLLM_SERVER_DEV_MODE=1"):
        await connect().load_weights("/models/step-7", 7)


@pytest.mark.parametrize("path", ["/collective_rpc", "/reset_prefix_cache"])
async def test_weights_in_doubt_are_not_sampled_from(connect: Connect, controlled: Vllm, path: str) -> None:
    """Neither by calls that come, nor by those that were held back."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def held(_: web.Request) -> web.Response:
        begun.set()
        await go_on.wait()
        return web.json_response(GENERATED)

    engine = connect(endpoint="generate")
    controlled.answers["/inference/v1/generate"] = held
    before = asyncio.create_task(ask(engine))
    await begun.wait()
    right = controlled.answers[path]
    controlled.answers[path] = {"success": False} if path == "/reset_prefix_cache" else (500, "no such tensor")
    with pytest.raises(EngineError, match=r"failed to load weights from '/models/step-7', and may have any: load some"):
        await engine.load_weights("/models/step-7", 7)
    assert controlled.posted[-1] == "/resume"
    go_on.set()
    for call in (before, ask(engine)):
        with pytest.raises(EngineError, match="may have any"):
            await call
    controlled.answers[path] = right
    await engine.load_weights("/models/step-8", 8)
    assert (await ask(engine)).weight_version == 8


async def test_a_server_that_dies_of_an_update_is_down(connect: Connect, controlled: Vllm) -> None:
    """As vLLM 0.29 does of a folder without weights: it answers 500, and ends."""
    controlled.answers["/collective_rpc"] = (500, {"error": {"message": "Worker failed with error ..."}})
    controlled.answers["/resume"] = (503, "")
    with pytest.raises(EngineDownError, match=r"may have any.*Worker failed.*has died since"):
        await connect().load_weights("/models/step-7", 7)


async def test_a_generation_that_spans_an_update_names_both(connect: Connect, server: Vllm) -> None:
    engine = connect(endpoint="generate")

    async def updated_meanwhile(_: web.Request) -> web.Response:
        engine.set_weight_version(4)
        return web.json_response(GENERATED)

    engine.set_weight_version(3)
    server.answers["/inference/v1/generate"] = updated_meanwhile
    said = await ask(engine)
    assert (said.oldest_weight_version, said.weight_version) == (3, 4)


async def test_an_update_goes_on_when_its_caller_gives_up(connect: Connect, controlled: Vllm) -> None:
    """Else the server would stay paused, and every call to it wait for ever."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(_: web.Request) -> web.Response:
        begun.set()
        await go_on.wait()
        return web.json_response({"results": [None]})

    controlled.answers["/collective_rpc"] = slowly
    engine = connect(endpoint="generate")
    given_up = asyncio.create_task(engine.load_weights("/models/step-7", 7))
    await begun.wait()
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    after = asyncio.create_task(engine.load_weights("/models/step-8", 8))
    go_on.set()
    await after
    versions = [body["new_version"] for path, body in controlled.asked if path == "/update_weight_version"]
    assert versions == ["7", "8"], "one after the other"
    assert controlled.asked[-1] == ("/resume", {})
