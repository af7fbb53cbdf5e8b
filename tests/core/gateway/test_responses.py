from collections.abc import Iterator
from typing import Any

import pytest

from gymlink.align import Parsed, ToolCall
from gymlink.gateway.call import Answer, Thread, assistant_message
from gymlink.gateway.responses import ResponsesRequest
from gymlink.gateway.wire import WireError
from gymlink.types import Turn

KEY = "0123456789abcdef"
TURN = Turn((1, 2), (3,), (-0.5,), "stop")
CUT = Turn((1, 2), (3,), (-0.5,), "length")
CALLED = Parsed("Look.", "why", (ToolCall("f", "{}"), ToolCall("g", '{"a": 1}')))


def asked(given: Any = "hi", **fields: object) -> ResponsesRequest:
    return ResponsesRequest.read({"input": given, **fields})


def answered(parsed: Parsed = CALLED, turn: Turn = TURN) -> Answer:
    return Answer.of(turn, parsed, assistant_message(parsed, KEY), key=KEY, model="policy")


def read(*items: Any, **fields: object) -> list[Any]:
    return list(asked(list(items), **fields).call({}).messages)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"input": None}, "input", "at least one item"),
        ({"input": 5}, "input", "a list is needed, not int"),
        ({"input": ["hi"]}, "input.0", "an object is needed, not str"),
        ({"input": []}, "input", "at least one item"),
        ({"background": True}, "background", "Input should be False"),
        ({"truncation": "auto"}, "truncation", "Input should be 'disabled'"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"prompt": {"id": "p"}}, "prompt", "not supported"),
        ({"include": ["message.output_text.logprobs"]}, "include", "not supported"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.type", "Input should be 'text'"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "runs no tools of its own"),
        (
            {"tools": [{"type": "function", "name": "f", "defer_loading": True}]},
            "tools.0.defer_loading",
            "not supported",
        ),
        ({"tool_choice": "required"}, "tool_choice", "use 'auto' or 'none'"),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "not found"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type", "'item_reference' is not supported"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content",
            "'input_image' is not text",
        ),
        ({"input": [{"role": "user"}]}, "input.0.content", "a text or a list of parts"),
        ({"input": [{"content": "x"}]}, "input.0.role", "a text is needed"),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "abc"}]},
            "input.0.encrypted_content",
            "not made by this gateway",
        ),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(WireError) as raised:
        ResponsesRequest.read({"input": "hi", **fields}).call({})
    assert (raised.value.status, said in str(raised.value)) == (400, True), raised.value
    assert raised.value.param == param


def test_a_text_is_a_user_message_and_instructions_come_first() -> None:
    messages = asked("hi", instructions="be brief").call({}).messages
    assert messages == ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"})


def test_items_of_one_answer_are_one_message() -> None:
    user, answer, result = read(
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "why"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Look."}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": ""},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "found"}]},
    )
    assert user == {"role": "user", "content": "ab"}
    assert (answer["role"], answer["reasoning_content"], answer["content"]) == ("assistant", "why", "Look.")
    assert [call["id"] for call in answer["tool_calls"]] == ["c1", "c2"]
    assert result == {"role": "tool", "tool_call_id": "c1", "content": "found"}


def test_two_answers_in_a_row_stay_two() -> None:
    said = {"type": "message", "role": "assistant", "content": "x"}
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "why"}]}
    assert len(read(said, said)) == 2
    assert [message.get("reasoning_content") for message in read(said, thought, said)] == [None, "why"]


def test_function_tools_are_told_as_chat_completions_tell_them() -> None:
    tool = {"type": "function", "name": "f", "description": None, "parameters": {"type": "object"}, "strict": True}
    told = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert asked(tools=[tool]).call({}).tools == [told]
    assert asked(tools=[tool], tool_choice="none").call({}).tools == ()


def test_an_answer_is_told_in_items() -> None:
    body = asked(metadata={"a": "b"}, max_output_tokens=9).body(answered())
    assert (body["id"], body["object"], body["status"], body["incomplete_details"]) == (
        f"resp_{KEY}",
        "response",
        "completed",
        None,
    )
    assert [item["type"] for item in body["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert len({item["id"] for item in body["output"]}) == 4
    assert body["output"][0]["content"] == [{"type": "reasoning_text", "text": "why"}]
    assert [item["call_id"] for item in body["output"][2:]] == [call["id"] for call in answered().calls]
    assert body["usage"]["total_tokens"] == 3


def test_an_answer_that_was_cut_is_incomplete() -> None:
    body = asked().body(answered(Parsed("Lo"), CUT))
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"
    assert [name for name, _ in asked().events(answered(Parsed("Lo"), CUT))][-1] == "response.incomplete"


def test_an_empty_answer_has_no_item() -> None:
    assert asked().body(answered(Parsed("")))["output"] == []


def test_a_stream_tells_each_item_and_ends_with_the_answer() -> None:
    events = list(asked(stream=True).events(answered()))
    assert [name for name, _ in events] == [data["type"] for _, data in events]
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    names = [name.removeprefix("response.") for name, _ in events]
    inner = ["content_part.added", "{}.delta", "{}.done", "content_part.done"]
    calls = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert names == [
        *("created", "in_progress", "output_item.added"),
        *(name.format("reasoning_text") for name in inner),
        *("output_item.done", "output_item.added"),
        *(name.format("output_text") for name in inner),
        *("output_item.done", *calls, *calls, "completed"),
    ]
    begun = [data["item"] for name, data in events if name == "response.output_item.added"]
    assert [item.get("content", item.get("arguments")) for item in begun] == [[], [], "", ""]
    assert events[-1][1]["response"] == asked(stream=True).body(answered())


async def test_a_conversation_goes_on_from_a_response_of_its_rollout(gateway) -> None:
    client = await gateway()
    rollout = client.service.open("0.a")
    _, first = await client.post("/rollout/0.a/v1/responses", {"input": "hi"})
    status, second = await client.post(
        "/rollout/0.a/v1/responses", {"input": "more", "previous_response_id": first["id"]}
    )
    assert (status, second["previous_response_id"]) == (200, first["id"])
    again = {"input": "other", "previous_response_id": first["id"]}
    assert (await client.post("/rollout/0.a/v1/responses", again))[0] == 200
    assert [turn.parent for turn in rollout.record.turns] == [None, 0, 0]
    assert [turn.cause for turn in rollout.record.turns] == [None] * 3


@pytest.mark.parametrize("where", ["another rollout", "no rollout", "not stored"])
async def test_a_response_that_is_not_remembered_is_named(gateway, where: str) -> None:
    client = await gateway()
    for rollout in ("0.a", "0.b"):
        client.service.open(rollout)
    path = "/v1/responses" if where == "no rollout" else "/rollout/0.a/v1/responses"
    _, first = await client.post(path, {"input": "hi", "store": where != "not stored"})
    path = path.replace("0.a", "0.b") if where == "another rollout" else path
    status, body = await client.post(path, {"input": "more", "previous_response_id": first["id"]})
    assert (status, body["error"]["param"]) == (400, "previous_response_id")
    assert first["id"] in body["error"]["message"]


@pytest.mark.parametrize("named", [True, False], ids=["previous_response_id", "whole input"])
async def test_a_remembered_conversation_is_held_once(gateway, named: bool) -> None:
    client = await gateway()
    rollout = client.service.open("0.a")
    items: list[Any] = []
    previous: dict[str, str] = {}
    for turn in range(10):
        new = {"role": "user", "content": f"question {turn}"}
        asked = {"input": [new], **previous} if named else {"input": [*items, new]}
        status, answer = await client.post("/rollout/0.a/v1/responses", {**asked, "instructions": "rules"})
        assert status == 200
        items += [new, *answer["output"]]
        previous = {"previous_response_id": answer["id"]}
    assert [turn.parent for turn in rollout.record.turns] == [None, *range(9)]
    held = {id(thread): thread for last in rollout.threads.values() for thread in lineage(last)}
    assert sum(len(thread.added) for thread in held.values()) == 20
    [*_, last] = rollout.threads.values()
    assert [message["role"] for message in last.messages] == ["user", "assistant"] * 10
    status, _ = await client.post("/rollout/0.a/v1/responses", {"input": "more", **previous, "instructions": "rules"})
    assert status == 200
    assert rollout.record.turns[-1].parent == 9


RULES = {"role": "system", "content": "rules"}


@pytest.mark.parametrize(
    "calls",
    [
        [{"instructions": "rules"}, {"system": True}, {"named": True}],
        [{"system": True}, {"instructions": "rules"}, {"named": True, "instructions": "rules"}],
        [{"instructions": "rules"}, {"instructions": "rules", "store": False}, {"instructions": "rules"}],
    ],
    ids=["instructions that become an item", "an item that becomes instructions", "one that is not stored"],
)
async def test_instructions_are_in_the_prompt_once(gateway, calls: list[dict[str, Any]]) -> None:
    client = await gateway()
    rollout = client.service.open("0.a")
    items: list[Any] = []
    previous = ""
    for turn, how in enumerate(calls):
        new = {"role": "user", "content": f"question {turn}"}
        whole = [*([RULES] if how.get("system") else []), *items, new]
        asked = {"input": [new], "previous_response_id": previous} if how.get("named") else {"input": whole}
        more = {name: how[name] for name in ("instructions", "store") if name in how}
        status, answer = await client.post("/rollout/0.a/v1/responses", {**asked, **more})
        assert status == 200
        items += [new, *answer["output"]]
        previous = answer["id"]
    assert [turn.parent for turn in rollout.record.turns] == [None, 0, 1]
    assert client.service.chat_format.decode(rollout.record.turns[-1].prompt_ids).count("rules") == 1


async def test_a_conversation_is_held_once_where_not_all_of_it_is_stored(gateway) -> None:
    client = await gateway()
    rollout = client.service.open("0.a")
    items: list[Any] = []
    for turn in range(10):
        new = {"role": "user", "content": f"question {turn}"}
        asked = {"input": [*items, new], "store": bool(turn % 2)}
        status, answer = await client.post("/rollout/0.a/v1/responses", asked)
        assert status == 200
        items += [new, *answer["output"]]
    assert [turn.parent for turn in rollout.record.turns] == [None, *range(9)]
    held = {id(thread): thread for last in rollout.threads.values() for thread in lineage(last)}
    assert sum(len(thread.added) for thread in held.values()) == 20


def lineage(thread: Thread | None) -> Iterator[Thread]:
    while thread is not None:
        yield thread
        thread = thread.extends
