"""What is read of the final response in Gym's answer."""

from typing import Any

import pytest

from gymlink.rollout.response import answers_from_the_end, carried_ids, output_items
from gymlink.types import CallIds


def said(text: Any, **more: Any) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": text, **more}


def thought(*texts: str) -> dict[str, Any]:
    return {"type": "reasoning", "summary": [{"type": "summary_text", "text": text} for text in texts]}


def called(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": f"id of {name}", "name": name, "arguments": "{}", **more}


RESULT = {"type": "function_call_output", "call_id": "id of a", "output": "done"}
USER = {"role": "user", "content": "again"}


def summary(items: list[dict[str, Any]]) -> list[tuple[str, Any, list[str]]]:
    answers = answers_from_the_end(items)
    return [
        (one["reasoning_content"], one["content"], [call["function"]["name"] for call in one["tool_calls"]])
        for one in answers
    ]


def test_each_call_of_the_policy_is_one_message_the_last_first() -> None:
    items = [thought("hm"), called("a"), called("b"), RESULT, thought("so"), said("it is done"), USER, said("bye")]
    assert summary(items) == [("", "bye", []), ("so", "it is done", []), ("hm", "", ["a", "b"])]
    assert next(iter(answers_from_the_end(items[:3])))["tool_calls"][0]["id"] == "id of a"


def test_calls_that_follow_each_other_are_told_apart() -> None:
    items = [said("one"), said("two"), thought("three"), said("", type=None), called("a")]
    assert summary(items) == [("three", "", ["a"]), ("", "two", []), ("", "one", [])]


def test_a_response_that_ends_with_the_environment() -> None:
    assert summary([said("one"), USER, RESULT]) == [("", "one", [])]
    assert summary([USER, RESULT]) == []


@pytest.mark.parametrize("summary_of", [None, "text", ["text"], [{"text": None}]])
def test_odd_reasoning_is_none(summary_of: Any) -> None:
    assert summary([{"type": "reasoning", "summary": summary_of}, said("a")]) == [("", "a", [])]


@pytest.mark.parametrize("answer", [None, {}, {"response": None}, {"response": {"output": "x"}}, {"response": []}])
def test_no_response_has_no_items(answer: Any) -> None:
    assert output_items(answer) == []


def test_items_that_are_none_are_passed_over() -> None:
    assert output_items({"response": {"output": [USER, None, "x"]}}) == [USER]


@pytest.mark.parametrize("odd", [None, ["1"], [True], "12", 1, [1.0]])
def test_ids_are_read_where_they_are_integers(odd: Any) -> None:
    whole = said("a", prompt_token_ids=[1, 2], generation_token_ids=[3])
    empty = said("", prompt_token_ids=[1], generation_token_ids=[])
    items = [whole, {**whole, "generation_token_ids": odd}, {**whole, "prompt_token_ids": odd}, USER, empty]
    assert [*carried_ids(items)] == [CallIds((1, 2), (3,)), CallIds((1,), ())]
