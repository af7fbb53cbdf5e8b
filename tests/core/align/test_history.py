"""What a call costs is what it adds, in however many conversations a rollout's calls take turns."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chats import Agent, chat_of
from gymlink.align import canonical
from gymlink.align import history as history_module
from gymlink.align import record as record_module
from gymlink.align.history import MAX_CONVERSATIONS, MAX_UNANSWERED, Histories
from gymlink.align.template import PROBE_TOOL
from gymlink.types import Message

TURNS = 20


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """The messages whose canonical form was made."""
    read: list[Message] = []
    for module in (record_module, history_module):
        monkeypatch.setattr(module, "canonical", lambda message: read.append(message) or canonical(message))
    return read


def said(words: str) -> dict[str, str]:
    return {"role": "user", "content": words}


def over_http(messages: list[Any]) -> list[Any]:
    return json.loads(json.dumps(messages))


@pytest.mark.parametrize("conversations", [1, 2, 10, MAX_CONVERSATIONS])
@pytest.mark.parametrize("opening", ["one for each", "one for all"])
def test_conversations_that_take_turns_cost_what_each_costs_alone(
    read: list[Message], conversations: int, opening: str
) -> None:
    agent = Agent(chat_of("qwen3"))
    system = {"role": "system", "content": "rules"}
    first = "question" if opening == "one for all" else "question {}"
    histories = [[system, said(first.format(number)), said(f"of {number}")] for number in range(conversations)]
    turns = TURNS if conversations < 20 else 3
    for turn in range(turns):
        for number, history in enumerate(histories):
            answer = agent.say(history, f"answer {turn} to {number}")
            histories[number] = over_http([*history, answer, said("more")])
    assert [turn.parent is None for turn in agent.record.turns] == [True] * conversations + [False] * (
        conversations * (turns - 1)
    )
    alone = 3 + 1 + (turns - 1) * (1 + 1)  # what is new in each call, and the answer that is added
    assert len(read) <= conversations * alone


def test_the_texts_of_a_call_are_not_held_beside_those_of_the_last() -> None:
    histories = Histories()
    first = histories.read([said("a question")], (), {})
    second = histories.read(over_http([said("a question"), said("and more")]), (), {})
    assert second.read[0] is first.read[0]
    assert second.chain[1] is first.chain[1]


def test_a_history_goes_on_from_the_one_that_it_shares_most_with() -> None:
    histories, alone = Histories(), Histories()
    long = [said(str(number)) for number in range(9)]
    for known in (long, long[:2], [*long[:5], said("other")], [said("other")]):
        histories.read(known, (), {})
    for length in range(1, 9):
        asked = [*long[:length], said("new")]
        assert histories.read(over_http(asked), (), {}).chain == alone.read(asked, (), {}).chain


def test_what_is_remembered_is_bounded() -> None:
    histories = Histories()
    answer = {"role": "assistant", "content": "an answer"}
    for number in range(MAX_CONVERSATIONS + 9):
        history = histories.read([said(str(number))], (), {})
        histories.expect(history, answer, canonical(answer))
    for number in range(MAX_UNANSWERED + 9):
        histories.read([said(f"unanswered {number}")], (), {})
    assert len(histories._latest) == MAX_CONVERSATIONS
    assert len(histories._unanswered) == MAX_UNANSWERED


def test_what_is_asked_for_and_not_answered_holds_on_to_no_chain() -> None:
    """As `/tokenize` does before each call: the history goes on from one that no answer came of."""
    histories = Histories()
    messages: list[Any] = []
    for turn in range(9):
        messages = [*messages, said(f"question {turn}")]
        for _ in range(2):
            history = histories.read(messages, (), {})
        assert history.goes_on_from is (histories._latest[-1] if turn else None)
        answer = {"role": "assistant", "content": f"answer {turn}"}
        histories.expect(history, answer, canonical(answer))
        messages = [*messages, answer]
        assert len(histories._latest) == 1
    for turn in range(9):
        messages = [*messages, said(f"never answered {turn}")]
        assert histories.read(messages, (), {}).goes_on_from is histories._latest[-1]


def test_an_answer_that_is_changed_in_place_is_another_message() -> None:
    agent = Agent(chat_of("qwen3"))
    call = {"id": "c", "type": "function", "function": {"name": "probe_tool", "arguments": '{"query": "this"}'}}
    message = {"role": "assistant", "content": "a look", "tool_calls": [call]}
    answer = agent.say([said("question")], "sampled", message=message, tools=[PROBE_TOOL])
    answer["tool_calls"][0]["function"]["arguments"] = '{"query": "other"}'
    result = {"role": "tool", "tool_call_id": "c", "content": "found"}
    assert agent.record.plan([said("question"), answer, result], [PROBE_TOOL]).cause == "edited"


@pytest.mark.parametrize(("one", "other"), [(1, True), (1, 1.0), (0, False)])
def test_arguments_that_python_takes_for_equal_are_not_the_same(one: object, other: object) -> None:
    def history(value: object) -> list[Any]:
        function = {"name": "probe_tool", "arguments": {"query": value}}
        calls = [{"id": "c", "type": "function", "function": function}]
        return [said("question"), {"role": "assistant", "content": "", "tool_calls": calls}]

    histories = Histories()
    first, second = (histories.read(history(value), (), {}) for value in (one, other))
    assert first.key != second.key


def test_reasoning_is_compared_once() -> None:
    agent = Agent(chat_of("qwen3"))
    history: list[Any] = [said("question")]
    for turn in range(TURNS):
        message = {"role": "assistant", "content": f"answer {turn}", "reasoning_content": f"thought {turn}"}
        answer = agent.say(history, f"answer {turn}", message=message)
        history = over_http([*history, answer, said("more")])
    assert agent.record.plan(history).parent == TURNS - 1
    assert agent.record._histories._unanswered[-1].checked == 2 * TURNS
    history[1]["reasoning_content"] = "another thought"
    edited = agent.record._histories.read(history, (), {})
    assert edited.checked == 1
    assert agent.record._reasoning_edited(edited, len(edited))
