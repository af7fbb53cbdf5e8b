"""Whatever is posted, the answer is one that a client can read: never a traceback, never a 500."""

import asyncio
import copy
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gymlink.engines import ScriptedEngine
from gymlink.gateway import Router, create_app, create_front, http
from gymlink.gateway.service import PolicyService
from gymlink.types import Sampling

SECRET = "s3cret"
HEADERS = {"Authorization": f"Bearer {SECRET}"}
TOOL = {"name": "look", "description": "looks", "parameters": {"type": "object", "properties": {"q": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"q": 1}'}}
CHAT = {
    "model": "policy",
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "reasoning_content": "why", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "found", "name": "look"},
        {"role": "assistant", "content": "so", "prompt_token_ids": [1], "generation_token_ids": [2]},
        {"role": "user", "content": "more"},
    ],
    "tools": [{"type": "function", "function": TOOL}],
    "tool_choice": "auto",
    "max_tokens": 4,
    "n": 1,
    "logprobs": True,
    "top_logprobs": 0,
    "stream": False,
    "stream_options": {"include_usage": True},
    "return_token_ids": True,
    "response_format": {"type": "text"},
    "chat_template_kwargs": {"enable_thinking": False},
    "metadata": {"gymlink_rollout": None},
    "gymlink_rollout": None,
}
RESPONSES = {
    "model": "policy",
    "instructions": "be brief",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "why"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "so"}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "found"},
    ],
    "tools": [{"type": "function", "strict": True, **TOOL}],
    "tool_choice": "auto",
    "max_output_tokens": 4,
    "reasoning": {"effort": "low", "summary": "auto"},
    "text": {"format": {"type": "text"}},
    "include": ["reasoning.encrypted_content"],
    "previous_response_id": None,
    "store": True,
    "stream": True,
    "metadata": {"a": "b"},
}
MESSAGES = {
    "model": "policy",
    "system": [{"type": "text", "text": "be brief"}],
    "messages": [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "why", "signature": "x"},
                {"type": "text", "text": "so"},
                {"type": "tool_use", "id": "c1", "name": "look", "input": {"q": 1}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "x", "is_error": True}]},
    ],
    "tools": [{"name": "look", "description": "looks", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "auto"},
    "max_tokens": 4,
    "stop_sequences": [],
    "output_config": {"effort": "low"},
    "thinking": {"type": "disabled"},
    "stream": True,
}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/tokenize": CHAT,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": MESSAGES,
}
ALLOWED = {200, 400, 404, 413}


class Posted:
    """The gateway's application, called in this process."""

    def __init__(self, app: Any) -> None:
        self._runner = asyncio.Runner()
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=HEADERS)

    def __call__(self, path: str, body: bytes) -> httpx.Response:
        return self._runner.run(self._client.post(path, content=body))

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()


@pytest.fixture(scope="module")
def post(chat_format) -> Iterator[Posted]:
    stop = chat_format.stop_token_ids[0]
    engine = ScriptedEngine(lambda prompt: (72, len(prompt) % 200, stop))
    service = PolicyService(chat_format, engine, Sampling(max_tokens=8))
    service.open("0.a")
    posted = Posted(create_app(service, SECRET))
    yield posted
    posted.close()


def check(answer: httpx.Response) -> None:
    assert answer.status_code in ALLOWED, answer.text
    assert "Traceback" not in answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["code"] == answer.status_code
        assert isinstance(error["message"], str)
        assert error["message"]
        assert (answer.json().get("type") == "error") == ("/v1/messages" in answer.request.url.path)


@pytest.mark.parametrize("path", BODIES)
def test_the_bodies_that_are_changed_below_are_good(post: Posted, path: str) -> None:
    answer = post(path, orjson.dumps(BODIES[path]))
    assert answer.status_code == 200, answer.text


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*here, key)
        yield from places(inner, (*here, key))


def changed(body: Any, place: tuple[Any, ...], value: Any, how: str) -> Any:
    """The body with the value at `place` replaced, left out, doubled or moved into a list."""
    body = copy.deepcopy(body)
    at = body
    for key in place[:-1]:
        at = at[key]
    match how:
        case "replace":
            at[place[-1]] = value
        case "remove":
            del at[place[-1]]
        case "wrap":
            at[place[-1]] = [at[place[-1]]]
        case "extend":
            if isinstance(at, list):
                at.insert(place[-1], value)
            else:
                at[value if isinstance(value, str) else str(value)[:9]] = value
    return body


numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-2, 2)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = st.sampled_from(["user", "assistant", "tool", "function", "text", "message", "reasoning", "0.a", "none", "all"])
leaves = st.none() | st.booleans() | numbers | texts | names
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | names, inner, max_size=3), max_leaves=6
)


@settings(max_examples=250, deadline=None)
@pytest.mark.parametrize("path", BODIES)
@given(data=st.data())
def test_a_body_with_anything_in_any_place(post: Posted, path: str, data: st.DataObject) -> None:
    body = BODIES[path]
    for _ in range(data.draw(st.integers(1, 3))):
        here = list(places(body))
        place = data.draw(st.sampled_from(here)) if here else ("x",)
        body = changed(
            body, place, data.draw(values), data.draw(st.sampled_from(["replace", "remove", "wrap", "extend"]))
        )
    check(post(path, orjson.dumps(body)))


@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("path", BODIES)
@given(values)
def test_a_body_that_is_any_json(post: Posted, path: str, value: Any) -> None:
    check(post(path, orjson.dumps(value)))


@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("path", BODIES)
@given(st.binary(max_size=40), st.integers(0, 10_000), st.booleans())
@example(b"", 0, True)
@example(b"\xff\xfe", 10, False)
def test_a_body_with_bytes_cut_out_or_put_in(post: Posted, path: str, junk: bytes, at: int, cut: bool) -> None:
    body = orjson.dumps(BODIES[path])
    at %= len(body)
    check(post(path, body[:at] + junk + (b"" if cut else body[at:])))


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "raw",
    [
        b"\x00",
        b"\xef\xbb\xbf{}",
        b'{"messages": "\\ud800"}',
        b'{"messages": [{"role": "user", "content": "\\udc00"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1' + b"0" * 400 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": NaN}',
        b'{"a":' * 2000,
        b"[" * 100_000,
        b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
)
def test_json_that_is_none_or_too_much(post: Posted, path: str, raw: bytes) -> None:
    answer = post(path, raw)
    check(answer)
    assert answer.status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL], "deep": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x", "deep": 1}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"d": 1}}),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "x"}],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}],
            },
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}]},
        ),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", "name": "f", "parameters": 1}]}),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", "name": "f", "deep": 1}]}),
        ("/v1/responses", {"input": "x", "metadata": 1}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f", "input_schema": 1}]}),
        (
            "/v1/messages",
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": 1}]}
                ]
            },
        ),
    ],
)
@pytest.mark.parametrize("depth", [200, 300, 900])
def test_what_is_nested_deeply_in_any_place_is_answered(
    post: Posted, path: str, body: dict[str, Any], depth: int
) -> None:
    text = orjson.dumps(body).replace(b":1", b":" + b'{"a":' * depth + b"1" + b"}" * depth)
    check(post(path, text))


def test_a_body_beyond_the_limit_is_413(post: Posted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_BODY_BYTES", 1000)
    for path in BODIES:
        answer = post(path, b"x" * 1001)
        check(answer)
        assert answer.status_code == 413


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses/resp_1", "/v1/messages/batches", "/rollout/0.a"])
def test_a_path_that_is_none_says_which_are(post: Posted, path: str) -> None:
    answer = post(path, b"{}")
    assert answer.status_code == 404
    assert "/v1/chat/completions" in answer.json()["error"]["message"]


@pytest.mark.parametrize("raw", [b"", b"[]", b"nonsense", b'{"gymlink_rollout": 5}', b'{"gymlink_rollout": "9.x"}'])
def test_the_front_refuses_in_the_same_way(raw: bytes) -> None:
    posted = Posted(create_front(SECRET, Router(-1), {}))
    try:
        for path in BODIES:
            answer = posted(path, raw)
            check(answer)
            assert answer.status_code != 200
    finally:
        posted.close()
