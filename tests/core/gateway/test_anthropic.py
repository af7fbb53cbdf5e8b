import json
from typing import Any

import pytest

from gymlink.align import Parsed, ToolCall
from gymlink.gateway.anthropic import MessagesRequest
from gymlink.gateway.call import Answer, assistant_message
from gymlink.gateway.wire import WireError
from gymlink.types import Turn

KEY = "0123456789abcdef"
TURN = Turn((1, 2), (3,), (-0.5,), "stop")
USER = {"role": "user", "content": "hi"}
CALLED = Parsed("Look.", "why", (ToolCall("f", "{}"), ToolCall("g", '{"a": 1}')))


def asked(*messages: Any, **fields: object) -> MessagesRequest:
    return MessagesRequest.read({"messages": list(messages or (USER,)), "max_tokens": 9, **fields})


def answered(parsed: Parsed = CALLED, turn: Turn = TURN) -> Answer:
    return Answer.of(turn, parsed, assistant_message(parsed, KEY), key=KEY, model="policy")


def read(*messages: Any, **fields: object) -> list[Any]:
    return list(asked(*messages, **fields).call({}).messages)


def said(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"messages": []}, "messages", "none of them has any content"),
        ({"messages": "hi"}, "messages", "a list is needed, not str"),
        ({"messages": [said()]}, "messages", "none of them has any content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'tool' is not supported"),
        ({"messages": [said({"type": "image"})]}, "messages.0.content", "'image' is not supported"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "a text or a list of blocks"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]},
            "messages.1.content",
            "'redacted_thinking' is not supported",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f"}]}]},
            "messages.0.content.0.input",
            "an object is needed",
        ),
        ({"messages": [said({"type": "tool_result"})]}, "messages.0.content.0.tool_use_id", "a text is needed"),
        ({"system": 5}, "system", "a list is needed, not int"),
        ({"stop_sequences": ["x"]}, "stop_sequences", "not supported"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "use 'auto' or 'none'"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice", "use 'auto' or 'none'"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type", "none of Anthropic's own"),
        ({"tools": [{"name": "f", "defer_loading": True}]}, "tools.0.defer_loading", "not supported"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "context_management.edits",
            "takes nothing out",
        ),
        ({"mcp_servers": [{}]}, "mcp_servers", "not supported"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format", "None"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(fields: dict[str, Any], param: str, told: str) -> None:
    with pytest.raises(WireError) as raised:
        MessagesRequest.read({"messages": [USER], **fields}).call({})
    assert raised.value.status == 400
    assert raised.value.param == param
    assert told in str(raised.value)


def test_what_is_harmless_is_passed_over() -> None:
    asked(
        stop_sequences=[],
        thinking={"type": "enabled", "budget_tokens": 1024},
        metadata={"user_id": "me"},
        cache_control={"type": "ephemeral"},
        temperature=0.1,
        mcp_servers=[],
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        tools=[{"name": "f", "type": "custom", "cache_control": {"type": "ephemeral"}, "strict": True}],
    ).call({})


def test_a_system_prompt_is_text_or_blocks_without_what_changes_in_every_request() -> None:
    assert read(system="Be brief.")[0] == {"role": "system", "content": "Be brief."}
    blocks = [text("x-anthropic-billing-header: cc_version=2.1; cch=1f;"), text("Be brief."), text("Be kind.")]
    assert read(system=blocks)[0] == {"role": "system", "content": "Be brief.\nBe kind."}
    assert read(system=[]) == [USER]


def test_each_result_in_a_user_message_is_a_tool_message_in_its_place() -> None:
    messages = read(
        said(
            {"type": "tool_result", "tool_use_id": "c1", "content": "one"},
            {"type": "tool_result", "tool_use_id": "c2", "content": [text("two"), text("lines")], "is_error": True},
            {"type": "tool_result", "tool_use_id": "c3"},
            text("Go on."),
            text("Please."),
        )
    )
    assert messages == [
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "Error: two\nlines"},
        {"role": "tool", "tool_call_id": "c3", "content": ""},
        {"role": "user", "content": "Go on.\nPlease."},
    ]


def test_an_answer_comes_back_as_it_was_given() -> None:
    body = asked().body(answered())
    assert [block["type"] for block in body["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    [back] = read({"role": "assistant", "content": body["content"]})
    message = answered().message
    assert (back["content"], back["reasoning_content"]) == (message["content"], message["reasoning_content"])
    assert [call["id"] for call in back["tool_calls"]] == [call["id"] for call in message["tool_calls"]]
    assert [json.loads(call["function"]["arguments"]) for call in back["tool_calls"]] == [{}, {"a": 1}]


@pytest.mark.parametrize("arguments", ["[1, 2]", "not JSON", '"text"', "1"])
def test_arguments_that_are_no_object_come_back_as_they_were(arguments: str) -> None:
    body = asked().body(answered(Parsed("", None, (ToolCall("f", arguments),))))
    [call] = read({"role": "assistant", "content": body["content"]})[0]["tool_calls"]
    assert call["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    ("parsed", "finish_reason", "stop_reason"),
    [
        (Parsed("x"), "stop", "end_turn"),
        (CALLED, "stop", "tool_use"),
        (Parsed("x"), "length", "max_tokens"),
        (CALLED, "length", "max_tokens"),
    ],
)
def test_why_it_stopped(parsed: Parsed, finish_reason: Any, stop_reason: str) -> None:
    body = asked().body(answered(parsed, Turn((1, 2), (3,), (-0.5,), finish_reason)))
    assert (body["stop_reason"], body["stop_sequence"]) == (stop_reason, None)
    assert (body["usage"]["input_tokens"], body["usage"]["output_tokens"]) == (2, 1)


def test_a_last_message_of_the_assistant_is_gone_on_with() -> None:
    assert asked(USER, {"role": "assistant", "content": "It is"}).call({}).template_args["continue_final_message"]
    assert asked(USER).call({}).template_args == {}


def test_effort_is_the_templates_argument() -> None:
    assert asked(output_config={"effort": "low"}).call({}).template_args == {"reasoning_effort": "low"}


def test_a_stream_tells_each_block() -> None:
    events = list(asked(stream=True).events(answered()))
    assert [name for name, _ in events] == [data["type"] for _, data in events]
    whole = asked().body(answered())
    assert [data["index"] for name, data in events if name == "content_block_start"] == [0, 1, 2, 3]
    deltas = [data["delta"] for name, data in events if name == "content_block_delta"]
    assert [delta["type"] for delta in deltas] == [
        *("thinking_delta", "signature_delta", "text_delta"),
        *("input_json_delta", "input_json_delta"),
    ]
    assert json.loads(deltas[-1]["partial_json"]) == whole["content"][-1]["input"]
    assert events[0][1]["message"]["content"] == []
    assert events[-2][1]["delta"]["stop_reason"] == whole["stop_reason"]
    assert events[-1][0] == "message_stop"


async def test_an_overflow_is_told_in_the_words_by_which_agents_know_it(gateway) -> None:
    client = await gateway(max_context=3)
    status, body = await client.post("/v1/messages", {"messages": [USER], "max_tokens": 5})
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")
    assert body["error"]["message"].startswith("prompt is too long: This model's maximum context length is 3 tokens")


async def test_an_error_is_read_by_both_kinds_of_clients(gateway) -> None:
    client = await gateway()
    status, body = await client.post("/v1/messages", {"messages": [USER], "stop_sequences": ["x"]})
    assert (status, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert (body["error"]["param"], body["error"]["code"]) == ("stop_sequences", 400)
    status, body = await client.post("/v1/messages", {}, secret="wrong")
    assert (status, body["type"], body["error"]["type"]) == (401, "error", "authentication_error")
    status, body = await client.post("/rollout/0.gone/v1/messages/count_tokens", {"messages": [USER]})
    assert (status, body["type"], body["error"]["type"]) == (404, "error", "not_found_error")
