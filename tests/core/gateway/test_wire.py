import orjson
import pytest

from gymlink.align import Parsed, ToolCall
from gymlink.gateway.wire import ID_FIELDS, WireError, assistant_message, chat_completion, parse_chat_request
from gymlink.types import Turn

MESSAGES = [{"role": "user", "content": "hi"}]


def body(**fields: object) -> bytes:
    return orjson.dumps({"messages": MESSAGES, **fields})


@pytest.mark.parametrize(
    ("sent", "param", "said"),
    [
        (b"{", None, "not JSON"),
        (b"{}", "messages", "Field required"),
        (orjson.dumps({"messages": []}), "messages", "at least 1"),
        (body(n=2), "n", "Input should be 1"),
        (body(stream=True), "stream", "Input should be False"),
        (body(max_tokens=0), "max_tokens", "greater than or equal to 1"),
        (body(logit_bias={"1": 2}), "logit_bias", "'logit_bias' is not supported"),
        (body(stop=["x"]), "stop", "'stop' is not supported"),
        (body(response_format={"type": "json_object"}), "response_format", "not supported"),
        (body(tool_choice="required"), "tool_choice", "use 'auto' or 'none'"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(sent: bytes, param: str | None, said: str) -> None:
    with pytest.raises(WireError) as raised:
        parse_chat_request(sent)
    assert raised.value.status == 400
    assert raised.value.param == param
    assert said in str(raised.value)


def test_what_gym_sends_is_accepted() -> None:
    request = parse_chat_request(
        body(
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
        )
    )
    assert (request.rollout, request.token_limit) == ("0.abc", 7)


def test_a_request_that_forbids_calls_shows_no_tools() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert parse_chat_request(body(tools=tools)).usable_tools == tools
    assert parse_chat_request(body(tools=tools, tool_choice="none")).usable_tools == []


def test_the_answer_carries_gyms_three_fields_and_the_finish_reason() -> None:
    turn = Turn((1, 2), (3,), (-0.5,), "stop")
    request = parse_chat_request(body(logprobs=True, return_tokens_as_token_ids=True))
    message = assistant_message(Parsed("", "why", (ToolCall("f", "{}", None),)), "k")
    answer = chat_completion(request, turn, message, model="policy")
    choice = answer["choices"][0]
    assert [list(choice["message"][name]) for name in ID_FIELDS] == [[1, 2], [3], [-0.5]]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["logprobs"] is None
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == choice["message"]["reasoning"] == "why"
    assert choice["message"]["tool_calls"][0]["id"] == "call_k_0"
    assert answer["usage"]["total_tokens"] == 3


def test_logprobs_come_in_openai_form_for_those_who_ask() -> None:
    answer = chat_completion(
        parse_chat_request(body(logprobs=True)), Turn((1,), (3,), (-0.5,), "length"), {}, model="m"
    )
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["logprobs"]["content"][0]["logprob"] == -0.5
