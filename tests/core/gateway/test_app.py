"""The gateway over real HTTP, with the scripted engine."""

import asyncio
from typing import Any

import pytest

from gymlink.config import GatewaySettings
from gymlink.errors import ConfigError, EngineError
from gymlink.gateway import GatewayServer, Router, create_app
from gymlink.types import Sampling

SECRET = "s3cret"
USER = {"role": "user", "content": "hi"}


async def test_two_turns_are_one_exact_chain(gateway) -> None:
    client = await gateway()
    rollout = client.service.open("0.a")
    _, first = await client.chat([USER], "0.a")
    message = first["choices"][0]["message"]
    status, second = await client.chat([USER, message, {"role": "user", "content": "more"}], "0.a")
    assert status == 200
    held = message["prompt_token_ids"] + message["generation_token_ids"]
    assert second["choices"][0]["message"]["prompt_token_ids"][: len(held)] == held
    assert [turn.parent for turn in rollout.record.turns] == [None, 0]
    assert client.service.totals.sampled_tokens == rollout.sampled_tokens == 6


async def test_an_agent_that_drops_the_ids_is_still_exact(gateway) -> None:
    client = await gateway()
    rollout = client.service.open("0.a")
    _, first = await client.chat([USER], "0.a")
    bare = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    await client.chat([USER, bare, USER], "0.a")
    assert [turn.parent for turn in rollout.record.turns] == [None, 0]


async def test_a_required_prefix_is_proven_by_the_prompt_that_comes_back(gateway) -> None:
    client = await gateway()
    client.service.open("0.a")
    _, first = await client.chat([USER], "0.a")
    message = first["choices"][0]["message"]
    held = message["prompt_token_ids"] + message["generation_token_ids"]
    # The agent's own words for what was said differ; whoever kept the ids knows which turn it was.
    history = [USER, {"role": "assistant", "content": "in other words"}, USER]
    body = {"messages": history, "gymlink_rollout": "0.a", "required_prefix_token_ids": held}
    status, second = await client.post("/v1/chat/completions", body)
    assert status == 200
    assert second["choices"][0]["message"]["prompt_token_ids"][: len(held)] == held


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: [*held[:-1], held[-1] + 1], "where"),
        (lambda held: [*held, 1, 2, 3] * 40, "is required"),
        (lambda held: [7], "at position 0"),
    ],
)
async def test_a_required_prefix_that_is_not_the_prompts_is_refused(gateway, change: Any, said: str) -> None:
    client = await gateway()
    client.service.open("0.a")
    _, first = await client.chat([USER], "0.a")
    message = first["choices"][0]["message"]
    required = change(message["prompt_token_ids"] + message["generation_token_ids"])
    history = [USER, {"role": "assistant", "content": message["content"]}, USER]
    status, body = await client.chat(history, "0.a", required_prefix_token_ids=required)
    assert (status, body["error"]["param"]) == (400, "required_prefix_token_ids")
    assert said in body["error"]["message"]
    assert len(client.service.engine.calls) == 1


async def test_every_call_but_health_needs_the_secret(gateway) -> None:
    client = await gateway()
    for path in ("/v1/chat/completions", "/tokenize", "/v1/tokenize"):
        status, body = await client.post(path, {"messages": [USER]}, secret="wrong")
        assert status == 401
        assert body["error"]["type"] == "authentication_error"
    async with client.http.get(client.server.url + "/v1/models") as answer:
        assert answer.status == 401
    async with client.http.get(client.server.url + "/health") as answer:
        assert answer.status == 200


async def test_models_and_tokenize(gateway) -> None:
    client = await gateway(max_context=100)
    headers = {"Authorization": f"Bearer {SECRET}"}
    async with client.http.get(client.server.url + "/v1/models", headers=headers) as answer:
        assert (await answer.json())["data"][0]["max_model_len"] == 100
    _, tokens = await client.post("/tokenize", {"messages": [USER]})
    _, chat = await client.chat([USER])
    assert tokens["tokens"] == chat["choices"][0]["message"]["prompt_token_ids"]
    assert tokens["count"] == len(tokens["tokens"])


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/chat/completions", b"nonsense", 400, "not JSON"),
        ("/v1/chat/completions", {"messages": "hi"}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [USER], "best_of": 2}, 400, "'best_of' is not supported"),
        ("/v1/chat/completions", {"messages": [USER], "gymlink_rollout": "0.gone"}, 404, "is not open"),
        ("/v1/nothing", {}, 404, "/v1/chat/completions"),
    ],
)
async def test_errors_have_openais_shape(gateway, path: str, body: Any, status: int, said: str) -> None:
    client = await gateway()
    got, answer = await client.post(path, body)
    assert got == status
    assert said in answer["error"]["message"]
    assert answer["error"]["code"] == status


async def test_an_overflow_is_answered_as_gym_expects(gateway) -> None:
    client = await gateway(max_context=3)
    client.service.open("0.a")
    status, body = await client.chat([USER], "0.a")
    assert status == 400
    assert "context length" in body["error"]["message"]


async def test_an_engine_failure_is_a_500_that_says_why(gateway) -> None:
    def broken(_: object) -> tuple[int, ...]:
        raise EngineError("out of memory")

    client = await gateway(broken)
    status, body = await client.chat([USER])
    assert (status, body["error"]["message"]) == (500, "out of memory")


async def test_a_bug_is_answered_and_not_shown_as_a_traceback(gateway, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: object) -> tuple[int, ...]:
        raise RuntimeError("surprise")

    client = await gateway(broken)
    status, body = await client.chat([USER])
    assert status == 500
    assert "RuntimeError: surprise" in body["error"]["message"]
    assert "unexpected failure" in caplog.text


async def test_sampling_is_the_trainers_and_only_the_length_may_be_lowered(gateway) -> None:
    client = await gateway()
    await client.chat([USER], temperature=0.1, top_p=0.5, seed=1, max_tokens=2)
    await client.chat([USER], max_tokens=1000)
    assert [call.sampling for call in client.service.engine.calls] == [Sampling(max_tokens=2), Sampling(max_tokens=8)]


async def test_closing_a_rollout_ends_its_calls_at_once(gateway) -> None:
    client = await gateway(latency_s=60)
    rollout = client.service.open("0.a")
    call = asyncio.create_task(client.chat([USER], "0.a"))
    while not client.service.engine.calls:  # noqa: ASYNC110 - the engine has no event to wait for
        await asyncio.sleep(0.01)
    client.service.close("0.a")
    status, body = await asyncio.wait_for(call, 5)
    assert (status, body["error"]["type"]) == (404, "not_found_error")
    assert rollout.sampled_tokens == 0


async def test_what_nobody_reads_becomes_no_turn_and_is_counted(gateway) -> None:
    client = await gateway(latency_s=0.3)
    rollout = client.service.open("0.a")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.chat([USER], "0.a"), 0.1)
    for _ in range(100):
        if rollout.sampled_tokens:
            break
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.05)
    assert rollout.record.turns == ()
    assert rollout.undelivered == {"undelivered": 3}


async def test_a_call_is_passed_on_to_the_process_that_owns_the_rollout(gateway) -> None:
    owner = await gateway()
    front = await gateway(router=(router := Router(0, {1: owner.server.url})))
    try:
        rollout = owner.service.open("1.a")
        status, _ = await front.chat([USER], "1.a")
        assert status == 200
        assert len(rollout.record.turns) == 1
        assert not front.service.engine.calls
        status, body = await front.chat([USER], "1.unknown")
        assert (status, body["error"]["type"]) == (404, "not_found_error")
        await owner.server.stop()
        status, body = await front.chat([USER], "1.a")
        assert (status, body["error"]["type"]) == (424, "peer_error")
    finally:
        await router.aclose()


async def test_a_hang_up_reaches_the_process_that_owns_the_rollout(gateway) -> None:
    owner = await gateway(latency_s=0.3)
    front = await gateway(router=(router := Router(0, {1: owner.server.url})))
    try:
        rollout = owner.service.open("1.a")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(front.chat([USER], "1.a"), 0.1)
        await asyncio.sleep(0.6)
        assert rollout.record.turns == ()
        assert rollout.undelivered == {"undelivered": 3}
    finally:
        await router.aclose()


async def test_a_port_in_use_is_said(gateway) -> None:
    client = await gateway()
    port = int(client.server.url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=rf"gateway.port {port} on 127.0.0.1 is in use"):
        GatewayServer(create_app(client.service, SECRET), GatewaySettings(port=port))


def test_the_advertised_host_is_the_one_gym_is_told() -> None:
    server = GatewayServer(None, GatewaySettings(advertise_host="node7"))  # type: ignore[arg-type]
    assert server.url.startswith("http://node7:")
    server._socket.close()
