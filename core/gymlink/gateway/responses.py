"""OpenAI's Responses.

Source of the shapes: the OpenAI Responses reference, and what the `openai` package reads of a stream. An assistant
message of the conversation is told there in several items (reasoning, a message, function calls); read back, they are
one message again. Reasoning is told in plain text, as the `content` of its item.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, StrictStr

from gymlink.gateway.call import Answer, Call, Thread, shown_tools
from gymlink.gateway.wire import Request, dumped, invalid, objects, refuse_others, text_field
from gymlink.types import Message, Tool

_ID = "resp_"
_INCLUDED = frozenset({"reasoning.encrypted_content"})
"""What may be asked to be included: reasoning is told in plain, so there is nothing encrypted to add."""

_TOOL_FIELDS = frozenset({"type", "name", "description", "parameters", "strict"})


class _TextFormat(BaseModel):
    type: Literal["text"] = "text"


class _Text(BaseModel):
    format: _TextFormat | None = None


class _Reasoning(BaseModel):
    effort: StrictStr | None = None


class ResponsesRequest(Request):
    """A request for a response, as far as this gateway honours it."""

    harmless: ClassVar[frozenset[str]] = frozenset(
        {"parallel_tool_calls", "user", "service_tier", "safety_identifier", "stream_options"}
        | {"prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"}
    )

    conversation: ClassVar[str] = "input"

    model: StrictStr | None = None
    input: Any
    instructions: StrictStr | None = None
    tools: Any = None
    tool_choice: Any = None
    max_output_tokens: int | None = Field(None, ge=1)
    previous_response_id: StrictStr | None = None
    reasoning: _Reasoning | None = None
    text: _Text | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    include: list[StrictStr] | None = None
    metadata: dict[StrictStr, StrictStr] | None = None
    store: bool | None = None
    stream: bool | None = None

    def call(self, threads: Mapping[str, Thread]) -> Call:
        """See `gymlink.gateway.call.Asked`."""
        for name in self.include or ():
            if name not in _INCLUDED:
                raise invalid(f"include {name!r} is not supported by this gateway; leave it out.", "include")
        text = isinstance(self.input, str)
        items = [{"role": "user", "content": self.input}] if text else objects(self.input, "input")
        thread = Thread(_messages(items), self._continued(threads))
        leading = ({"role": "system", "content": self.instructions},) if self.instructions else ()
        messages = (*leading, *thread.messages)
        if len(messages) == len(leading):
            raise invalid("input: at least one item is needed.", "input")
        effort = self.reasoning.effort if self.reasoning else None
        return Call(
            messages=messages,
            tools=shown_tools(_function_tools(objects(self.tools, "tools")), self.tool_choice),
            template_args={**({"reasoning_effort": effort} if effort else {}), **(self.chat_template_kwargs or {})},
            token_limit=self.max_output_tokens,
            thread=thread,
            is_stored=self.store is not False,
        )

    def _continued(self, threads: Mapping[str, Thread]) -> Thread | None:
        """The conversation up to the response that this request goes on from. Instructions do not carry over."""
        if self.previous_response_id is None:
            return None
        thread = threads.get(self.previous_response_id.removeprefix(_ID))
        if thread is None:
            raise invalid(
                f"Previous response with id {self.previous_response_id!r} not found. A response is remembered while "
                "its rollout is open, unless store was false; those of calls without a rollout are not. Send the "
                "conversation as input instead.",
                "previous_response_id",
            )
        return thread

    def body(self, answer: Answer) -> dict[str, Any]:
        """See `gymlink.gateway.call.Asked`."""
        turn = answer.turn
        prompt, completion = turn.prompt_tokens, len(turn.completion_ids)
        return self._response(
            answer,
            status=_status(answer),
            output=_items(answer),
            incomplete_details={"reason": "max_output_tokens"} if answer.cut else None,
            usage={
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + completion,
            },
        )

    def _response(self, answer: Answer, **more: Any) -> dict[str, Any]:
        return {
            "id": _ID + answer.key,
            "object": "response",
            "created_at": answer.created,
            "model": answer.model,
            "error": None,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "previous_response_id": self.previous_response_id,
            "parallel_tool_calls": True,
            "tool_choice": self.tool_choice or "auto",
            "tools": self.tools or [],
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            "metadata": self.metadata or {},
            **more,
        }

    def events(self, answer: Answer) -> Iterator[tuple[str | None, Any]]:
        """See `gymlink.gateway.call.Asked`."""
        numbers = count()

        def event(what: str, /, **data: Any) -> tuple[str, dict[str, Any]]:
            kind = f"response.{what}"
            return kind, {"type": kind, "sequence_number": next(numbers), **data}

        begun = self._response(answer, status="in_progress", output=[], incomplete_details=None, usage=None)
        yield event("created", response=begun)
        yield event("in_progress", response=begun)
        for index, item in enumerate(_items(answer)):
            at = {"output_index": index}
            inside = {**at, "item_id": item["id"]}
            yield event("output_item.added", **at, item=_begun(item))
            if item["type"] == "function_call":
                arguments = item["arguments"]
                yield event("function_call_arguments.delta", **inside, delta=arguments)
                yield event("function_call_arguments.done", **inside, arguments=arguments, name=item["name"])
            else:
                [part] = item["content"]
                inside["content_index"] = 0
                logprobs: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
                yield event("content_part.added", **inside, part={**part, "text": ""})
                yield event(f"{part['type']}.delta", **inside, delta=part["text"], **logprobs)
                yield event(f"{part['type']}.done", **inside, text=part["text"], **logprobs)
                yield event("content_part.done", **inside, part=part)
            yield event("output_item.done", **at, item=item)
        whole = self.body(answer)
        yield event("incomplete" if answer.cut else "completed", response=whole)


def _status(answer: Answer) -> str:
    return "incomplete" if answer.cut else "completed"


def _items(answer: Answer) -> list[dict[str, Any]]:
    """What was sampled, as output items. An answer without a word is no item."""
    items: list[dict[str, Any]] = []
    if answer.parsed.reasoning:
        part = {"type": "reasoning_text", "text": answer.parsed.reasoning}
        items.append({"type": "reasoning", "id": f"rs_{answer.key}", "summary": [], "content": [part]})
    if answer.message["content"]:
        said = {"type": "output_text", "text": answer.message["content"], "annotations": [], "logprobs": []}
        message = {"type": "message", "id": f"msg_{answer.key}", "role": "assistant", "content": [said]}
        items.append({**message, "status": _status(answer)})
    for index, call in enumerate(answer.calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        item = {"type": "function_call", "id": f"fc_{answer.key}_{index}", "call_id": call["id"]}
        items.append({**item, "name": name, "arguments": arguments, "status": "completed"})
    return items


def _begun(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item as it is announced, before its text."""
    empty: dict[str, Any] = {"arguments": ""} if item["type"] == "function_call" else {"content": []}
    return {**item, **empty, **({"status": "in_progress"} if "status" in item else {})}


def _function_tools(tools: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """Tools in chat-completions form. `strict` asks for constrained sampling, which no policy here is trained with."""
    dumped(tools, "tools")  # an answer repeats them
    made: list[Tool] = []
    for index, tool in enumerate(tools):
        where = f"tools.{index}"
        if tool.get("type") != "function":
            raise invalid(
                f"{where}.type {tool.get('type')!r} is not supported: this gateway runs no tools of its own. Give "
                "'function' tools, which the agent calls.",
                f"{where}.type",
            )
        refuse_others(tool, _TOOL_FIELDS, f"{where}.")
        text_field(tool, "name", where)
        function = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
        made.append({"type": "function", "function": function})
    return made


def _messages(items: Sequence[Mapping[str, Any]]) -> Sequence[Message]:
    """The conversation that the items tell, in chat-completions form."""
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        where = f"input.{index}"
        match item.get("type") or "message":
            case "message" if item.get("role") != "assistant":
                messages.append({"role": text_field(item, "role", where), "content": _text(item, "content", where)})
            case "message":
                _answer(messages, before={"content", "tool_calls"})["content"] = _text(item, "content", where)
            case "reasoning":
                answer = _answer(messages, before={"content", "tool_calls"})
                answer["reasoning_content"] = answer.get("reasoning_content", "") + _reasoning(item, where)
            case "function_call":
                _answer(messages, before=set()).setdefault("tool_calls", []).append(_function_call(item, where))
            case "function_call_output":
                call_id = text_field(item, "call_id", where)
                messages.append({"role": "tool", "tool_call_id": call_id, "content": _text(item, "output", where)})
            case other:
                raise invalid(f"{where}.type {other!r} is not supported by this gateway.", f"{where}.type")
    return messages


def _answer(messages: list[dict[str, Any]], *, before: set[str]) -> dict[str, Any]:
    """The assistant message that an item belongs to: the last one, unless it has what such an item comes before."""
    if not messages or messages[-1]["role"] != "assistant" or before & messages[-1].keys():
        messages.append({"role": "assistant"})
    return messages[-1]


def _function_call(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = {
        "name": text_field(item, "name", where),
        "arguments": text_field(item, "arguments", where, needed=False),
    }
    return {"id": text_field(item, "call_id", where), "type": "function", "function": function}


def _reasoning(item: Mapping[str, Any], where: str) -> str:
    text = _text(item, "content", where) if item.get("content") else _text(item, "summary", where)
    if not text and item.get("encrypted_content"):
        raise invalid(
            f"{where}.encrypted_content was not made by this gateway, which tells reasoning in plain text and cannot "
            "read it. Leave the item out.",
            f"{where}.encrypted_content",
        )
    return text


def _text(item: Mapping[str, Any], name: str, where: str) -> str:
    """A field that holds a text, or parts with a text each; another kind of part is refused by name."""
    value, place = item.get(name), f"{where}.{name}"
    if isinstance(value, str):
        return value
    if value is None:
        raise invalid(f"{place}: a text or a list of parts is needed.", place)
    for index, part in enumerate(parts := objects(value, place)):
        if not str(part.get("type")).endswith("text"):
            raise invalid(f"{place}.{index}.type {part.get('type')!r} is not text; only text is supported.", place)
    return "".join(text_field(part, "text", place, needed=False) for part in parts)
