from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gymlink.gateway import guarded, json_response, rollout_key, rollout_path

USER = {"role": "user", "content": "hi"}
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
BODIES = {CHAT: {"messages": [USER]}, RESPONSES: {"input": "hi"}, MESSAGES: {"messages": [USER], "max_tokens": 5}}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def ways(secret: str, path: str, rollout: str) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Every way in which a call can name a rollout: path, body and headers."""
    body, key = BODIES[path], rollout_key(secret, rollout)
    yield rollout_path(rollout, path), body, bearer(secret)
    yield path, body, bearer(key)
    yield path, body, {"x-api-key": key}
    yield path, {**body, "gymlink_rollout": rollout}, bearer(secret)
    yield path, {**body, "metadata": {"gymlink_rollout": rollout}}, {"X-Api-Key": secret}
    yield rollout_path(rollout, path), {**body, "gymlink_rollout": rollout}, bearer(key)


@pytest.mark.parametrize("path", BODIES)
async def test_a_rollout_is_known_by_path_key_and_body(gateway, path: str) -> None:
    client = await gateway()
    rollout = client.service.open("0.a")
    calls = list(ways(client.secret, path, "0.a"))
    for where, body, headers in calls:
        status, answer, _ = await client.send(where, body, headers)
        assert status == 200, answer
    assert len(rollout.record.turns) == len(calls)
    assert client.service.totals.unattributed_calls == 0


@pytest.mark.parametrize("path", BODIES)
async def test_a_call_that_names_two_rollouts_is_refused(gateway, path: str) -> None:
    client = await gateway()
    for rollout in ("0.a", "0.b"):
        client.service.open(rollout)
    key, body = bearer(rollout_key(client.secret, "0.a")), BODIES[path]
    for where, sent in [
        (rollout_path("0.b", path), body),
        (path, {**body, "gymlink_rollout": "0.b"}),
        (path, {**body, "metadata": {"gymlink_rollout": "0.b"}}),
        (rollout_path("0.a", path), {**body, "gymlink_rollout": "0.b"}),
    ]:
        status, answer, _ = await client.send(where, sent, key)
        assert (status, "'0.a'" in answer["error"]["message"], "'0.b'" in answer["error"]["message"]) == (400, 1, 1)
    assert client.service.engine.calls == []


@pytest.mark.parametrize("name", [5, {"a": 1}, [], True])
async def test_a_name_that_is_no_text_is_refused(gateway, name: Any) -> None:
    client = await gateway()
    for body in ({"gymlink_rollout": name}, {"metadata": {"gymlink_rollout": name}}):
        status, answer = await client.post(CHAT, {"messages": [USER], **body})
        assert (status, "is a text" in answer["error"]["message"]) == (400, True)


async def test_a_key_that_is_not_right_opens_nothing(gateway) -> None:
    client = await gateway()
    client.service.open("0.a")
    good = rollout_key(client.secret, "0.a")
    bad = [
        *("", "rk-", "rk-0.a", "rk-0.a.", good[:-1], good + "0", good.removeprefix("rk-"), good.upper()),
        *(rollout_key("other", "0.a"), good.replace("0.a", "0.b"), "rk-\u00ff.\u00ff"),
    ]
    for key in bad:
        for headers in (bearer(key), {"x-api-key": key}, {"Authorization": key}):
            status, answer, _ = await client.send(CHAT, BODIES[CHAT], headers)
            assert (status, answer["error"]["type"]) == (401, "authentication_error"), key
    assert client.service.engine.calls == []


async def test_one_good_key_of_two_is_enough(gateway) -> None:
    client = await gateway()
    assert (await client.send(CHAT, BODIES[CHAT], {**bearer("x"), "x-api-key": client.secret}))[0] == 200


async def test_a_rollouts_key_opens_no_control(gateway) -> None:
    called = []

    async def control(request: Request) -> Response:
        called.append(request.url.path)
        return json_response({})

    async def careless(request: Request) -> Response:
        called.append(request.url.path)
        return json_response({})

    routes = [
        Route("/control", guarded(control), methods=["POST"]),
        Route("/rollout/{id}/careless", careless, methods=["POST"]),
    ]
    client = await gateway(routes=routes)
    client.service.open("0.a")
    key = bearer(rollout_key(client.secret, "0.a"))
    for path in ("/control", "/rollout/0.a/control", "/rollout/0.a/careless", "//control", "/v1/../control"):
        status, answer, _ = await client.send(path, {}, key)
        assert (status, answer["error"]["type"]) == (404, "not_found_error"), path
    assert called == []
    for path in ("/control", "/rollout/0.a/careless"):
        assert (await client.send(path, {}, bearer(client.secret)))[0] == 200
    assert called == ["/control", "/rollout/0.a/careless"]


async def test_a_key_outlives_its_rollout_but_opens_nothing_then(gateway) -> None:
    client = await gateway()
    client.service.open("0.a")
    client.service.close("0.a")
    status, answer, _ = await client.send(CHAT, BODIES[CHAT], bearer(rollout_key(client.secret, "0.a")))
    assert (status, answer["error"]["type"]) == (404, "not_found_error")


async def test_models_and_tokens_are_there_below_a_rollout_too(gateway) -> None:
    client = await gateway(max_context=100)
    client.service.open("0.a")
    key = bearer(rollout_key(client.secret, "0.a"))
    for path in ("/v1/models", "/rollout/0.a/v1/models"):
        status, answer, _ = await client.send(path, b"", key, "GET")
        assert (status, answer["data"][0]["id"]) == (200, "policy")
    for path in ("/tokenize", "/rollout/0.a/tokenize", "/rollout/0.a/v1/tokenize"):
        status, answer, _ = await client.send(path, {"messages": [USER]}, key)
        assert (status, answer["count"]) == (200, len(answer["tokens"]))


async def test_the_sdks_list_the_policy_and_read_our_errors(gateway) -> None:
    client = await gateway(max_context=3)
    url = client.server.url
    client.service.open("0.a")
    key = rollout_key(client.secret, "0.a")
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as sdk:
        assert [model.id async for model in sdk.models.list()] == ["policy"]
        with pytest.raises(openai.BadRequestError, match="maximum context length is 3 tokens"):
            await sdk.chat.completions.create(model="policy", messages=[USER])
        with pytest.raises(openai.BadRequestError, match="'logit_bias' is not supported"):
            await sdk.chat.completions.create(model="policy", messages=[USER], logit_bias={"1": 2})
    async with anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0) as sdk:
        assert [model.id async for model in sdk.models.list()] == ["policy"]
        with pytest.raises(anthropic.BadRequestError, match="maximum context length is 3 tokens"):
            await sdk.messages.create(model="policy", messages=[USER], max_tokens=5)
    async with anthropic.AsyncAnthropic(base_url=url, api_key="wrong", max_retries=0) as sdk:
        with pytest.raises(anthropic.AuthenticationError, match="key is missing or wrong"):
            await sdk.messages.create(model="policy", messages=[USER], max_tokens=5)
