"""Anthropic's Messages, for agents that speak it.

Source of the shapes: the Anthropic Messages reference, and what the `anthropic` package reads of a stream. The results
of tool calls stand there in a user message; read back, each is a tool message of its own, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import orjson
from pydantic import BaseModel, Field, StrictStr

from gymlink.gateway.call import Answer, Call, Thread, shown_tools
from gymlink.gateway.wire import Request, dumped, invalid, objects, refuse_others, text_field
from gymlink.types import Message, Tool

_BILLING = "x-anthropic-billing-header:"
"""Claude Code opens its system prompt with a block of this name, whose checksum differs in every request."""

_TOOL_FIELDS = frozenset(
    {"type", "name", "description", "input_schema", "cache_control", "strict", "eager_input_streaming"}
)

_UNREAD = "unread_arguments"
"""The input of a call whose arguments are no JSON object, which is all that an input may be."""


class _Choice(BaseModel):
    type: Literal["auto", "none", "any", "tool"]


class _OutputConfig(BaseModel):
    model_config = {"extra": "forbid"}

    effort: StrictStr | None = None
    format: None = None


class MessagesRequest(Request):
    """A request for a message, as far as this gateway honours it.

    Whether the policy thinks is its chat template's to say, so `thinking` is as pinned as the temperature.
    """

    harmless: ClassVar[frozenset[str]] = frozenset(
        {"metadata", "service_tier", "cache_control", "thinking", "inference_geo", "user_profile_id", "diagnostics"}
    )

    model: StrictStr | None = None
    messages: Any
    system: Any = None
    tools: Any = None
    tool_choice: _Choice | None = None
    max_tokens: int | None = Field(None, ge=1)
    output_config: _OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    stream: bool | None = None

    def call(self, threads: Mapping[str, Thread]) -> Call:  # noqa: ARG002 - a message names no earlier answer
        """See `gymlink.gateway.call.Asked`."""
        messages = [*_system(self.system)]
        for index, message in enumerate(objects(self.messages, "messages")):
            messages += _read(message, f"messages.{index}")
        if not messages:
            raise invalid("messages: none of them has any content.", "messages")
        args: dict[str, Any] = {**(self.chat_template_kwargs or {})}
        if self.output_config and self.output_config.effort:
            args["reasoning_effort"] = self.output_config.effort
        if messages[-1]["role"] == "assistant":
            args["continue_final_message"] = True  # what Anthropic does with a last message of the assistant
        _check_edits(self.context_management or {})
        choice = self.tool_choice.type if self.tool_choice else None
        return Call(
            messages=messages,
            tools=shown_tools(_function_tools(objects(self.tools, "tools")), choice),
            template_args=args,
            token_limit=self.max_tokens,
        )

    def body(self, answer: Answer) -> dict[str, Any]:
        """See `gymlink.gateway.call.Asked`."""
        usage = {**_INPUT_ONLY, "input_tokens": answer.turn.prompt_tokens}
        return {
            **_head(answer),
            "content": _blocks(answer),
            "stop_reason": _stop_reason(answer),
            "usage": {**usage, "output_tokens": len(answer.turn.completion_ids)},
        }

    def events(self, answer: Answer) -> Iterator[tuple[str | None, Any]]:
        """See `gymlink.gateway.call.Asked`."""

        def event(kind: str, **data: Any) -> tuple[str, dict[str, Any]]:
            return kind, {"type": kind, **data}

        usage = {**_INPUT_ONLY, "input_tokens": answer.turn.prompt_tokens, "output_tokens": 0}
        begun = {**_head(answer), "content": [], "stop_reason": None, "usage": usage}
        yield event("message_start", message=begun)
        for index, block in enumerate(_blocks(answer)):
            empty, deltas = _told(block)
            yield event("content_block_start", index=index, content_block=empty)
            for delta in deltas:
                yield event("content_block_delta", index=index, delta=delta)
            yield event("content_block_stop", index=index)
        ended = {"stop_reason": _stop_reason(answer), "stop_sequence": None}
        yield event("message_delta", delta=ended, usage={"output_tokens": len(answer.turn.completion_ids)})
        yield event("message_stop")


_INPUT_ONLY = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}


def _head(answer: Answer) -> dict[str, Any]:
    return {
        "id": f"msg_{answer.key}",
        "type": "message",
        "role": "assistant",
        "model": answer.model,
        "stop_sequence": None,
    }


def _stop_reason(answer: Answer) -> str:
    if answer.cut:
        return "max_tokens"
    return "tool_use" if answer.calls else "end_turn"


def _blocks(answer: Answer) -> list[dict[str, Any]]:
    """What was sampled, as content blocks. Blank text is none: Anthropic's API takes no such block back."""
    blocks: list[dict[str, Any]] = []
    if answer.parsed.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.parsed.reasoning, "signature": answer.key})
    if answer.parsed.content.strip():
        blocks.append({"type": "text", "text": answer.parsed.content})
    for call in answer.calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        blocks.append({"type": "tool_use", "id": call["id"], "name": name, "input": _input(arguments)})
    return blocks


def _told(block: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A block as it is announced, and the pieces that fill it."""
    match block["type"]:
        case "thinking":
            thinking = {"type": "thinking_delta", "thinking": block["thinking"]}
            signature = {"type": "signature_delta", "signature": block["signature"]}
            return {**block, "thinking": "", "signature": ""}, [thinking, signature]
        case "text":
            return {**block, "text": ""}, [{"type": "text_delta", "text": block["text"]}]
        case _:
            text = orjson.dumps(block["input"]).decode()
            return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": text}]


def _input(arguments: str) -> dict[str, Any]:
    try:
        read = orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError:
        read = None
    return read if isinstance(read, dict) else {_UNREAD: arguments}


def _arguments(given: Mapping[str, Any], where: str) -> str:
    """The other way round: a call's arguments as JSON text."""
    if given.keys() == {_UNREAD} and isinstance(given[_UNREAD], str):
        return str(given[_UNREAD])
    return dumped(given, where)


def _function_tools(tools: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """Tools in chat-completions form. `strict` asks for constrained sampling, which no policy here is trained with."""
    made: list[Tool] = []
    for index, tool in enumerate(tools):
        where = f"tools.{index}"
        if tool.get("type") not in (None, "custom"):
            raise invalid(
                f"{where}.type {tool.get('type')!r} is not supported: this gateway knows none of Anthropic's own "
                "tools. Give tools with a name and an input_schema, which the agent calls.",
                f"{where}.type",
            )
        refuse_others(tool, _TOOL_FIELDS, f"{where}.")
        function = {"name": text_field(tool, "name", where)}
        if description := text_field(tool, "description", where, needed=False):
            function["description"] = description
        made.append({"type": "function", "function": {**function, "parameters": tool.get("input_schema") or {}}})
    return made


def _check_edits(context_management: Mapping[str, Any]) -> None:
    """What Anthropic's servers would take out of the history is the agent's to take out here."""
    where = "context_management.edits"
    for index, edit in enumerate(objects(context_management.get("edits"), where)):
        if edit.get("keep") != "all":
            raise invalid(f"{where}.{index} is not supported: this gateway takes nothing out of a history.", where)


def _system(system: Any) -> list[Message]:
    """The system prompt, a text or blocks."""
    text = system if isinstance(system, str) else _text(objects(system, "system"), "system", leave_out=_BILLING)
    return [{"role": "system", "content": text}] if text else []


def _read(message: Mapping[str, Any], where: str) -> list[Message]:
    """One message of Anthropic's as those of a chat completion."""
    role, content = text_field(message, "role", where), message.get("content")
    if role not in {"user", "assistant", "system"}:
        raise invalid(f"{where}.role {role!r} is not supported: use 'user', 'assistant' or 'system'.", f"{where}.role")
    place = f"{where}.content"
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if content is None:
        raise invalid(f"{place}: a text or a list of blocks is needed.", place)
    blocks = objects(content, place)
    if role == "assistant":
        return [_read_answer(blocks, place)]
    messages: list[Message] = []
    said: list[Mapping[str, Any]] = []
    for index, block in enumerate(blocks):
        if block.get("type") == "tool_result":
            messages += _said(role, said, place)
            said = []
            messages.append(_read_result(block, f"{place}.{index}"))
        else:
            said.append(block)
    return messages + _said(role, said, place)


def _said(role: str, blocks: Sequence[Mapping[str, Any]], where: str) -> list[Message]:
    return [{"role": role, "content": _text(blocks, where)}] if blocks else []


def _read_answer(blocks: Sequence[Mapping[str, Any]], where: str) -> Message:
    texts: list[Mapping[str, Any]] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        place = f"{where}.{index}"
        match block.get("type"):
            case "thinking":
                thoughts.append(text_field(block, "thinking", place, needed=False))
            case "tool_use":
                given = block.get("input")
                if not isinstance(given, dict):
                    raise invalid(f"{place}.input: an object is needed.", f"{place}.input")
                arguments = _arguments(given, f"{place}.input")
                function = {"name": text_field(block, "name", place), "arguments": arguments}
                calls.append({"id": text_field(block, "id", place), "type": "function", "function": function})
            case _:
                texts.append(block)
    message: dict[str, Any] = {"role": "assistant", "content": _text(texts, where)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _read_result(block: Mapping[str, Any], where: str) -> Message:
    """A tool's result. That it failed has no other place in a chat completion than its text."""
    content = block.get("content")
    text = content if isinstance(content, str) else _text(objects(content, f"{where}.content"), f"{where}.content")
    if block.get("is_error"):
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": text_field(block, "tool_use_id", where), "content": text}


def _text(blocks: Sequence[Mapping[str, Any]], where: str, *, leave_out: str | None = None) -> str:
    """The text of text blocks, a line break between two. Another kind of block is refused by name."""
    texts = []
    for index, block in enumerate(blocks):
        if block.get("type") != "text":
            raise invalid(f"{where}.{index}.type {block.get('type')!r} is not supported: only text is.", where)
        texts.append(text_field(block, "text", f"{where}.{index}", needed=False))
    return "\n".join(text for text in texts if leave_out is None or not text.startswith(leave_out))
