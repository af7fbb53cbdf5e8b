from typing import Any

import pytest

from gymlink.align import ID_FIELDS, Parsed, ToolCall
from gymlink.gateway.call import Answer, assistant_message
from gymlink.gateway.chat import ChatRequest, TokenizeRequest
from gymlink.gateway.wire import WireError
from gymlink.types import Turn

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
TURN = Turn((1, 2), (3,), (-0.5,), "stop")
CALLED = Parsed("", "why", (ToolCall("f", "{}", None), ToolCall("g", '{"a": 1}', "functions.g:1")))


def asked(**fields: object) -> ChatRequest:
    return ChatRequest.read({"messages": MESSAGES, **fields})


def answered(parsed: Parsed = CALLED, turn: Turn = TURN, key: str = "0123456789abcdef") -> Answer:
    return Answer.of(turn, parsed, assistant_message(parsed, key), key=key, model="policy")


def refusal(**fields: object) -> WireError:
    with pytest.raises(WireError) as raised:
        asked(**fields).call({})
    assert raised.value.status == 400
    return raised.value


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"messages": []}, "messages", "at least one is needed"),
        ({"messages": "hi"}, "messages", "a list is needed, not str"),
        ({"n": 2}, "n", "Input should be 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "greater than or equal to 1"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "'logit_bias' is not supported"),
        ({"stop": ["x"]}, "stop", "'stop' is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "Input should be 'text'"),
        ({"tool_choice": "required"}, "tool_choice", "use 'auto' or 'none'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "use 'auto' or 'none'"),
        ({"top_logprobs": 3}, "top_logprobs", "Input should be 0"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"add_generation_prompt": False}, "add_generation_prompt", "together with continue_final_message"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "use 'function'"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name", "a text is needed"),
        ({"required_prefix_token_ids": ["1"]}, "required_prefix_token_ids.0", "valid integer"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(fields: dict[str, Any], param: str | None, said: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert said in str(error)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": "hi"}, "messages.0.role"),
        ({"role": ""}, "messages.0.role"),
        ({"role": 5}, "messages.0.role"),
        ({"role": "user", "content": 5}, "messages.0.content"),
        ({"role": "user", "content": [5]}, "messages.0.content.0"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages.0.content.0.text"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "messages.0.function_call"),
        ({"role": "assistant", "tool_calls": "f"}, "messages.0.tool_calls"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages.0.tool_calls.0.function"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages.0.tool_calls.0.function.name"),
        ({"role": "tool", "tool_call_id": 1}, "messages.0.tool_call_id"),
    ],
)
def test_a_message_that_is_none_is_refused_by_its_place(message: dict[str, Any], param: str) -> None:
    call = asked(messages=[message]).call({})
    with pytest.raises(WireError) as refused:
        call.check(0, call.messages[0])
    assert (refused.value.status, refused.value.param) == (400, param)


async def test_a_message_is_checked_when_it_first_comes(gateway) -> None:
    client = await gateway()
    client.service.open("0.a")
    history = [{"role": "user", "content": "hi"}, {"role": "tool", "content": "found", "tool_call_id": "c"}]
    assert (await client.chat(history, "0.a"))[0] == 200
    for _ in range(2):  # what was refused is not remembered
        status, body = await client.chat([history[0], {**history[1], "tool_call_id": ["c"]}], "0.a")
        assert (status, body["error"]["param"]) == (400, "messages.1.tool_call_id")
    for field in ("audio", "function_call", "refusal"):
        status, body = await client.chat([{**history[0], field: {"name": "f"}}, history[1]], "0.a")
        assert (status, body["error"]["param"]) == (400, f"messages.0.{field}")
    assert len(client.service.rollouts.find("0.a").record.turns) == 1


def test_what_gym_sends_is_accepted() -> None:
    call = asked(
        model="policy",
        parallel_tool_calls=True,
        metadata={"extra_body": "{}"},
        logprobs=True,
        top_logprobs=0,
        return_tokens_as_token_ids=True,
        temperature=0.3,
        tool_choice="auto",
        stop=None,
        gymlink_rollout="0.abc",
        max_tokens=7,
        continue_final_message=True,
        add_generation_prompt=False,
    ).call({})
    assert (call.token_limit, call.template_args) == (7, {"continue_final_message": True})


def test_a_request_that_forbids_calls_shows_no_tools() -> None:
    assert asked(tools=[TOOL]).call({}).tools == [TOOL]
    assert asked(tools=[TOOL], tool_choice="none").call({}).tools == ()


def test_reasoning_effort_is_the_templates_argument() -> None:
    request = asked(reasoning_effort="low", chat_template_kwargs={"enable_thinking": False})
    assert request.call({}).template_args == {"reasoning_effort": "low", "enable_thinking": False}


def test_tokenize_reads_what_makes_a_prompt_and_passes_over_the_rest() -> None:
    call = TokenizeRequest.read({"messages": MESSAGES, "tools": [TOOL], "add_special_tokens": False}).call()
    assert (call.messages, call.tools) == (MESSAGES, [TOOL])


@pytest.mark.parametrize(
    "asking", [{"return_tokens_as_token_ids": True}, {"return_token_ids": True}, {"required_prefix_token_ids": [1]}]
)
def test_the_message_carries_gyms_three_fields_for_who_asks(asking: dict[str, Any]) -> None:
    message = asked(**asking).body(answered())["choices"][0]["message"]
    assert [list(message[name]) for name in ID_FIELDS] == [[1, 2], [3], [-0.5]]


def test_nobody_else_gets_ids() -> None:
    body = asked(logprobs=False).body(answered())
    assert not {*ID_FIELDS, "token_ids"} & {*body, *body["choices"][0], *body["choices"][0]["message"]}


def test_vllms_two_fields_are_for_who_asks_for_them() -> None:
    body = asked(return_token_ids=True).body(answered())
    assert (body["prompt_token_ids"], body["choices"][0]["token_ids"]) == ((1, 2), (3,))
    assert "prompt_token_ids" not in asked(return_tokens_as_token_ids=True).body(answered())


def test_an_answer_has_openais_shape() -> None:
    body = asked(logprobs=True, return_tokens_as_token_ids=True).body(answered())
    choice = body["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["logprobs"] is None
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == choice["message"]["reasoning"] == "why"
    assert [call["id"] for call in choice["message"]["tool_calls"]] == ["012345600", "functions.g:1"]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}


def test_logprobs_come_in_openai_form_for_those_who_ask() -> None:
    cut = answered(Parsed("x"), Turn((1,), (3,), (-0.5,), "length"))
    choice = asked(logprobs=True).body(cut)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["content"][0]["logprob"] == -0.5


def test_a_stream_adds_up_to_the_answer() -> None:
    request = asked(stream=True, stream_options={"include_usage": True}, return_token_ids=True)
    *chunks, last = [data for name, data in request.events(answered()) if name is None]
    assert last == "[DONE]"
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [call for delta in deltas for call in delta.get("tool_calls", ())] == [
        {"index": index, **call} for index, call in enumerate(answered().calls)
    ]
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]][-1] == "tool_calls"
    assert [chunk["usage"] for chunk in chunks][:-1] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 3
    assert chunks[0]["prompt_token_ids"] == (1, 2)
    assert chunks[1]["choices"][0]["token_ids"] == (3,)
