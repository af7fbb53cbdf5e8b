"""What agents change without meaning to, and what they do mean."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gymlink.align import canonical, split_reasoning


def call(arguments: Any, name: str = "look", call_id: str | None = "c1") -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": call_id, "function": {"name": name, "arguments": arguments}}]}


SAME = [
    ({"role": "user", "content": "hi"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}),
    ({"role": "assistant", "content": None}, {"role": "assistant", "content": "", "tool_calls": []}),
    ({"role": "assistant", "content": "a"}, {"role": "assistant", "content": " a\n", "tool_calls": None}),
    ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
    (call('{"a": 1, "b": [2]}'), call({"b": [2], "a": 1})),
    (call('{"a":1}', call_id="c1"), call('{ "a" : 1 }', call_id=None)),
    (call(""), call({})),
    (
        {"role": "assistant", "content": "a", "reasoning": "r"},
        {"role": "assistant", "content": "<think>\nr\n</think>\n\na"},
    ),
    (
        {"role": "assistant", "content": "a", "reasoning_content": "r"},
        {"role": "assistant", "content": "a", "generation_token_ids": [1], "prompt_token_ids": None},
    ),
]
DIFFERENT = [
    ({"role": "user", "content": "hi"}, {"role": "user", "content": "hi "}),
    ({"role": "user", "content": "hi"}, {"role": "system", "content": "hi"}),
    (call('{"a": 1}'), call('{"a": 2}')),
    (call('{"a": 1}'), call('{"a": "1"}')),
    (call("{}"), call("{}", name="other")),
    ({"role": "assistant", "content": "ab"}, {"role": "assistant", "content": "a b"}),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_accidents_do_not_matter(one: Any, other: Any) -> None:
    assert canonical(one).digest == canonical(other).digest


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_changes_do(one: Any, other: Any) -> None:
    assert canonical(one).digest != canonical(other).digest


def test_reasoning_is_found_where_gym_puts_it() -> None:
    gym = {"role": "assistant", "content": "<think>one</think><think>two</think>text"}
    assert split_reasoning(gym) == ("text", "one\ntwo")
    assert split_reasoning({"role": "assistant", "content": "text <think>no</think>"})[1] is None
    assert canonical({"role": "assistant", "content": "", "reasoning": "r"}).is_silent
    assert not canonical(call("{}")).is_silent


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "reasoning", "name"]), JSON))
def test_never_raises(message: Any) -> None:
    assert len(canonical(message).digest) == 16
