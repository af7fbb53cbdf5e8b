"""The front over real HTTP: before real gateways with the scripted engine, and before real servers as agents."""

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from gymlink.config import GatewaySettings
from gymlink.engines import ScriptedEngine
from gymlink.gateway import (
    GatewayServer,
    OpenRollout,
    PolicyService,
    Router,
    agent_url,
    create_app,
    create_front,
    rollout_key,
    rollout_path,
)
from gymlink.types import Sampling

SECRET = "s3cret"
USER = {"role": "user", "content": "hi"}
FRONT = -1


class Worker:
    """A gateway as a worker of the job has one. What it says first is `letter`."""

    def __init__(self, chat_format: Any, letter: str, hold_s: float = 30, **options: Any) -> None:
        said = (ord(letter), chat_format.stop_token_ids[0])
        self.engine = ScriptedEngine(lambda _: said, **options)
        self.service = PolicyService(chat_format, self.engine, Sampling(max_tokens=8), hold_s=hold_s)
        self.server = GatewayServer(create_app(self.service, SECRET), GatewaySettings())
        self.said = said

    def open(self, *rollouts: str) -> list[OpenRollout]:
        return [self.service.open(rollout) for rollout in rollouts]


class Agent:
    """A server of Gym's that keeps what it was sent, and answers as its path says."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, dict[str, str]]] = []
        self.hung_up = asyncio.Event()
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/{how}/run", self._answer)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)

    async def start(self) -> None:
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.asked.append((body, dict(request.headers)))
        match request.match_info["how"]:
            case "teapot":
                return web.Response(status=418, body=b'"the row \xc3\xa9  as it is"')
            case "hangs_up":
                assert request.transport is not None
                request.transport.close()
            case "slow":
                try:
                    await asyncio.sleep(30)
                except asyncio.CancelledError:
                    self.hung_up.set()
                    raise
            case "digest":
                return web.json_response({"sha": hashlib.sha256(body).hexdigest(), "echo": body.decode()})
        answer = web.json_response({"reward": 1.0, "row": orjson.loads(body)})
        answer.set_cookie("session", "theirs")
        return answer


class Front:
    """The front, and a client of it."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self.http = http
        self.router = Router(FRONT)
        self.agents: dict[str, str] = {}
        self.server = GatewayServer(create_front(SECRET, self.router, self.agents), GatewaySettings())

    async def post(self, path: str, body: Any, secret: str | None = SECRET) -> tuple[int, Any]:
        status, content = await self.raw(self.server.url + path, orjson.dumps(body), secret)
        return status, orjson.loads(content)

    async def raw(self, url: str, body: bytes, secret: str | None = SECRET) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        async with self.http.post(url, data=io.BytesIO(body), headers=headers) as answer:
            return answer.status, await answer.read()

    async def chat(self, rollout: str | None, **more: Any) -> tuple[int, Any]:
        named = {"gymlink_rollout": rollout} if rollout else {}
        asked = {"messages": [USER], "return_tokens_as_token_ids": True}
        return await self.post("/v1/chat/completions", {**asked, **named, **more})

    async def run(self, agent: str, row: Any) -> tuple[int, Any]:
        status, content = await self.raw(f"{agent_url(self.server.url, agent)}/run", orjson.dumps(row))
        return status, orjson.loads(content)


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        front = Front(http)
        try:
            await front.server.start()
            yield front
        finally:
            await front.server.stop()
            await front.router.aclose()


@pytest.fixture
async def enlist(front: Front, chat_format: Any) -> AsyncIterator[Callable[..., Any]]:
    """`await enlist("a")` is one more worker, numbered from 0, whose engine says "a"."""
    running: list[Worker] = []

    async def make(letter: str, **options: Any) -> Worker:
        worker = Worker(chat_format, letter, **options)
        front.router.peers[str(len(running))] = worker.server.url
        running.append(worker)
        await worker.server.start()
        return worker

    try:
        yield make
    finally:
        for worker in running:
            await worker.server.stop()


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    agent = Agent()
    try:
        await agent.start()
        yield agent
    finally:
        await agent.runner.cleanup()


def sampled(answers: Iterable[tuple[int, Any]]) -> list[list[int]]:
    """The ids of each answer, all of which are good."""
    answers = list(answers)
    assert {status for status, _ in answers} == {200}, answers
    return [answer["choices"][0]["message"]["generation_token_ids"] for _, answer in answers]


async def test_a_call_reaches_the_owner_of_its_rollout(front: Front, enlist) -> None:
    first, second = await enlist("a"), await enlist("b")
    (of_first,), (of_second,) = first.open("0.x"), second.open("1.x")
    assert sampled([await front.chat("1.x"), await front.chat("0.x")]) == [list(second.said), list(first.said)]
    assert [call.rollout_id for call in first.engine.calls] == ["0.x"]
    assert [call.rollout_id for call in second.engine.calls] == ["1.x"]
    assert of_first.sampled_tokens == of_second.sampled_tokens == 2


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
async def test_so_do_its_tokens(front: Front, enlist, path: str) -> None:
    worker = await enlist("a")
    worker.open("0.x")
    status, answer = await front.post(path, {"messages": [USER], "gymlink_rollout": "0.x"})
    assert status == 200
    _, chat = await front.chat("0.x")
    assert answer["tokens"] == chat["choices"][0]["message"]["prompt_token_ids"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
async def test_a_rollout_may_be_named_by_path_or_key(front: Front, enlist, path: str, stream: bool) -> None:
    worker = await enlist("a")
    (rollout,) = worker.open("0.x")
    body = {"input": "hi"} if path.endswith("responses") else {"messages": [USER]}
    sent = orjson.dumps({**body, "stream": stream})
    url, key = front.server.url, rollout_key(SECRET, "0.x")
    for where, secret in [(rollout_path("0.x", path), SECRET), (path, key), (rollout_path("0.x", path), key)]:
        async with front.http.post(url + where, data=sent, headers={"Authorization": f"Bearer {secret}"}) as answer:
            text = await answer.text()
            assert answer.status == 200, text
            assert answer.content_type == ("text/event-stream" if stream else "application/json")
            assert ("data: " in text) == stream
    assert len(rollout.record.turns) == 3
    status, answer = await front.post(rollout_path("0.y", path), {**body, "stream": stream}, key)
    assert (status, "more than one rollout" in answer["error"]["message"]) == (400, True)


async def test_a_rollouts_key_opens_no_agent(front: Front, enlist, agent: Agent) -> None:
    worker = await enlist("a")
    worker.open("0.x")
    front.agents["mine"] = f"{agent.url}/well"
    status, answer = await front.post("/agents/mine/run", {}, rollout_key(SECRET, "0.x"))
    assert (status, answer["error"]["type"]) == (404, "not_found_error")
    assert not agent.asked


async def test_the_models_of_a_rollout_are_its_workers(front: Front, enlist) -> None:
    await enlist("a")
    headers = {"Authorization": f"Bearer {rollout_key(SECRET, '0.x')}"}
    async with front.http.get(front.server.url + "/v1/models", headers=headers) as answer:
        assert (answer.status, (await answer.json())["data"][0]["id"]) == (200, "policy")


async def test_a_pause_of_the_worker_is_passed_back_with_when_to_try_again(front: Front, enlist) -> None:
    worker = await enlist("a", hold_s=0.05)
    worker.open("0.x")
    worker.service.pause()
    headers = {"Authorization": f"Bearer {SECRET}"}
    body = {"messages": [USER], "gymlink_rollout": "0.x"}
    async with front.http.post(front.server.url + "/v1/chat/completions", json=body, headers=headers) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (429, "1")


async def test_what_the_worker_refuses_is_passed_back(front: Front, enlist) -> None:
    worker = await enlist("a", max_context=2)
    worker.open("0.x")
    status, answer = await front.chat("0.x")
    assert status == 400
    assert "context length" in answer["error"]["message"], "the words by which Gym knows an overflow"
    status, answer = await front.chat("0.x", best_of=2)
    assert (status, answer["error"]["param"]) == (400, "best_of")
    status, answer = await front.chat("0.gone")
    assert (status, answer["error"]["type"]) == (404, "not_found_error")


@pytest.mark.parametrize("rollout", ["1.x", "7.x", "-1.x", "", "nonsense", None])
async def test_a_rollout_of_nobody_is_unknown(front: Front, enlist, rollout: str | None) -> None:
    await enlist("a")
    status, answer = await front.chat(rollout)
    assert (status, answer["error"]["type"]) == (404, "not_found_error")
    assert "No worker of this job owns the rollout" in answer["error"]["message"]


@pytest.mark.parametrize("body", [b"nonsense", b"[]", b'{"gymlink_rollout": {"a": 1}}', b""])
async def test_a_body_that_names_no_rollout_is_refused_in_openais_shape(front: Front, enlist, body: bytes) -> None:
    await enlist("a")
    status, content = await front.raw(f"{front.server.url}/v1/chat/completions", body)
    assert status in {400, 404}
    assert orjson.loads(content)["error"]["code"] == status


async def test_every_call_but_health_needs_the_secret(front: Front, enlist, agent: Agent) -> None:
    worker = await enlist("a")
    worker.open("0.x")
    front.agents["mine"] = f"{agent.url}/well"
    body = {"messages": [USER], "gymlink_rollout": "0.x"}
    for path in ("/v1/chat/completions", "/tokenize", "/v1/tokenize", "/agents/mine/run", "/agents/none/run", "/"):
        for secret in (None, "wrong", "", SECRET[:-1]):
            status, answer = await front.post(path, body, secret)
            assert (status, answer["error"]["type"]) == (401, "authentication_error"), (path, secret)
    assert not worker.engine.calls
    assert not agent.asked
    async with front.http.get(front.server.url + "/health") as answer:
        assert await answer.json() == {"status": "ok", "workers": 1, "agents": ["mine"]}


async def test_a_row_is_passed_on_as_it_is_and_without_the_secret(front: Front, agent: Agent) -> None:
    front.agents |= {"well": f"{agent.url}/well", "teapot": f"{agent.url}/teapot"}
    row = b'{ "responses_create_params": {"input": "\xc3\xa9"},  "n": 1.50 }'
    status, answer = await front.raw(f"{agent_url(front.server.url, 'well')}/run", row)
    assert (status, orjson.loads(answer)["reward"]) == (200, 1.0)
    assert await front.raw(f"{agent_url(front.server.url, 'teapot')}/run", row) == (
        418,
        b'"the row \xc3\xa9  as it is"',
    )
    assert [body for body, _ in agent.asked] == [row, row]
    for _, headers in agent.asked:
        assert "Authorization" not in headers
        assert SECRET not in str(headers)
        assert "Cookie" not in headers, "Gym marks its sessions by cookie, and two rollouts must never share one"


@pytest.mark.parametrize("name", ["my agent", "a/b", "caf\u00e9?#%2F"])
async def test_any_name_of_an_agent_is_an_address(front: Front, agent: Agent, name: str) -> None:
    front.agents[name] = f"{agent.url}/well"
    assert (await front.run(name, {"n": 1}))[1] == {"reward": 1.0, "row": {"n": 1}}


async def test_an_agent_that_does_not_run_is_told_with_those_that_do(front: Front, agent: Agent) -> None:
    status, answer = await front.run("mine", {})
    assert (status, answer["error"]["message"]) == (404, "No agent 'mine' runs; running: none.")
    front.agents |= {"b": f"{agent.url}/well", "a": f"{agent.url}/well"}
    status, answer = await front.run("mine", {})
    assert (status, answer["error"]["message"]) == (404, "No agent 'mine' runs; running: a, b.")
    front.agents["mine"] = f"{agent.url}/well"
    assert (await front.run("mine", {}))[0] == 200


async def test_who_died_is_told_and_the_others_go_on(front: Front, enlist, agent: Agent) -> None:
    first, second = await enlist("a"), await enlist("b")
    first.open("0.x")
    second.open("1.x")
    sampled([await front.chat("0.x")])  # there is a connection that can be cut
    await first.server.stop()
    status, answer = await front.chat("0.x")
    assert (status, answer["error"]["type"]) == (424, "peer_error")
    assert first.server.url in answer["error"]["message"]
    assert sampled([await front.chat("1.x")]) == [list(second.said)]
    front.agents["mine"] = f"{agent.url}/well"
    await agent.runner.cleanup()
    status, answer = await front.run("mine", {})
    assert (status, answer["error"]["type"]) == (424, "peer_error")


async def test_one_that_hangs_up_in_the_middle_is_told_at_once(front: Front, agent: Agent) -> None:
    front.agents["mine"] = f"{agent.url}/hangs_up"
    status, answer = await asyncio.wait_for(front.run("mine", {}), 5)
    assert (status, answer["error"]["type"]) == (424, "peer_error")


async def test_a_worker_can_come_while_the_front_serves(front: Front, enlist) -> None:
    first = await enlist("a", latency_s=0.3)
    first.open("0.x")
    assert (await front.chat("1.x"))[0] == 404
    running = asyncio.create_task(front.chat("0.x"))
    second = await enlist("b")
    second.open("1.x")
    assert sampled([await front.chat("1.x"), await running]) == [list(second.said), list(first.said)]


async def test_a_hang_up_reaches_the_worker_and_is_counted(front: Front, enlist) -> None:
    worker = await enlist("a", latency_s=0.3)
    (rollout,) = worker.open("0.x")
    call = asyncio.create_task(front.chat("0.x"))
    await until(lambda: worker.engine.calls)
    call.cancel()
    await until(lambda: rollout.sampled_tokens)
    assert rollout.record.turns == ()
    assert rollout.undelivered == {"undelivered": 2}
    assert worker.service.totals.attributed_tokens == 2


async def test_a_hang_up_reaches_the_agent(front: Front, agent: Agent) -> None:
    front.agents["slow"] = f"{agent.url}/slow"
    call = asyncio.create_task(front.run("slow", {}))
    await until(lambda: agent.asked)
    call.cancel()
    await asyncio.wait_for(agent.hung_up.wait(), 5)


async def test_a_rollout_that_is_closed_ends_its_call_through_the_front(front: Front, enlist) -> None:
    worker = await enlist("a", latency_s=60)
    worker.open("0.x")
    call = asyncio.create_task(front.chat("0.x"))
    await until(lambda: worker.engine.calls)
    worker.service.close("0.x")
    status, _ = await asyncio.wait_for(call, 5)
    assert status == 404


async def test_large_bodies_go_both_ways(front: Front, enlist, agent: Agent) -> None:
    row = b'{"text": "' + b"x" * 30_000_000 + b'"}'
    front.agents["digest"] = f"{agent.url}/digest"
    status, answer = await front.raw(f"{agent_url(front.server.url, 'digest')}/run", row)
    assert status == 200
    told = orjson.loads(answer)
    assert told["sha"] == hashlib.sha256(row).hexdigest()
    assert told["echo"].encode() == row
    worker = await enlist("a")
    worker.open("0.x")
    # The ids that Gym sends back on messages are what makes requests large; here they are not this rollout's.
    ids = list(range(100_000)) * 50
    assert len(orjson.dumps(ids)) > 29_000_000
    said = {"role": "assistant", "content": "so", "prompt_token_ids": ids, "generation_token_ids": [1]}
    sampled([await front.chat("0.x", messages=[USER, said, USER])])


async def test_two_hundred_calls_at_once_each_to_its_own(front: Front, enlist) -> None:
    workers = [await enlist(letter, latency_s=0.2) for letter in "ab"]
    names = [f"{index % 2}.{index}" for index in range(200)]
    opened = [workers[index % 2].open(name)[0] for index, name in enumerate(names)]
    async with asyncio.timeout(20):
        answers = await asyncio.gather(*map(front.chat, names))
    assert sampled(answers) == [list(workers[index % 2].said) for index in range(200)]
    assert [len(rollout.record.turns) for rollout in opened] == [1] * 200
    assert [worker.service.totals.requests for worker in workers] == [100, 100]


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110 - what is looked at has no event to wait for
            await asyncio.sleep(0.01)
