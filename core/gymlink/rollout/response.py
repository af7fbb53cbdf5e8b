"""Reads the final response in Gym's answer to `/run`: what the policy said in it, and the token ids it may carry.

Gym tells a call of the policy in several output items: reasoning, then at most one message, then tool calls. Where ids
travel through Gym, the last item of a call carries those of the whole call.
Source: responses_converter.py (postprocess_assistant_message_dict) of NeMo Gym 0.4.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gymlink.types import CallIds, Message, TokenIds

Item = Mapping[str, Any]


def output_items(answer: Mapping[str, Any] | None) -> Sequence[Item]:
    """The output items of the final response, oldest first; none when there is no response."""
    response = (answer or {}).get("response")
    output = response.get("output") if isinstance(response, Mapping) else None
    return [item for item in output if isinstance(item, Mapping)] if isinstance(output, list) else []


def carried_ids(items: Sequence[Item]) -> Iterator[CallIds]:
    """The ids on these items, in their order. What is not a list of integers is passed over."""
    for item in items:
        prompt, completion = (_ids(item.get(name)) for name in ("prompt_token_ids", "generation_token_ids"))
        if prompt and completion is not None:
            yield CallIds(prompt, completion)


def answers_from_the_end(items: Sequence[Item]) -> Iterator[Message]:
    """What the assistant said, the last first, as chat-completions messages: one for each call of the policy."""
    at = len(items)
    while at:
        if _kind(items[at - 1]) is None:
            at -= 1
            continue
        end = at
        while at and _kind(items[at - 1]) == "call":
            at -= 1
        if at and _kind(items[at - 1]) == "message":
            at -= 1
        while at and _kind(items[at - 1]) == "reasoning":
            at -= 1
        yield _message(items[at:end])


def _kind(item: Item) -> str | None:
    """What part of an assistant message an item is; None for what the environment or the user says."""
    match item.get("type"):
        case "function_call":
            return "call"
        case "reasoning":
            return "reasoning"
        case "message" | None if item.get("role") == "assistant":
            return "message"
    return None


def _message(items: Sequence[Item]) -> Message:
    reasoning = [str(part.get("text") or "") for item in items for part in _parts(item)]
    calls = [_call(item) for item in items if _kind(item) == "call"]
    contents = [item.get("content") for item in items if _kind(item) == "message"]
    return {
        "role": "assistant",
        "reasoning_content": "\n".join(reasoning),
        "content": contents[0] if contents else "",
        "tool_calls": calls,
    }


def _parts(reasoning: Item) -> Sequence[Mapping[str, Any]]:
    parts = reasoning.get("summary") if _kind(reasoning) == "reasoning" else None
    return [part for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []


def _call(item: Item) -> Mapping[str, Any]:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    return {"id": item.get("call_id"), "type": "function", "function": function}


def _ids(value: Any) -> TokenIds | None:
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        return None
    try:
        return TokenIds(value)
    except ValueError:
        return None
