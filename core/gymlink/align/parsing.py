"""Reading a sampled completion: its reasoning, its tool calls, and the rest.

Three readers, best first: the hand-made one of a known format (`renderers`), the one that a tokenizer carries
(`response_template`, transformers >= 5.13), and tags, for the shapes that the template's own text shows. All of them
leave in the content what they cannot read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import orjson

from gymlink.align.base import Ids, Parsed, ToolCall
from gymlink.align.canonical import tool_calls_of
from gymlink.align.template import ChatTemplate
from gymlink.types import Message, Tool

PROMPT_TAIL: Final = 1024
"""Ids of the prompt that a reader sees: enough for the generation prompt and what it opened."""
_CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>)?\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_NAME = re.compile(r"[\w.:-]+")
_KEY_VALUE = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


Decode = Callable[[Sequence[int]], str]
"""Ids to text, special tokens included; raises on ids that are none."""


class Parser(Protocol):
    """Reads a sampled completion. May raise; its caller does not."""

    name: str
    stop_token_ids: Ids

    def parse(self, prompt_ids: Sequence[int], completion_ids: Sequence[int], tools: Sequence[Tool]) -> Parsed: ...


def safe_parse(
    parser: Parser, decode: Decode, prompt_ids: Sequence[int], completion_ids: Sequence[int], tools: Sequence[Tool]
) -> Parsed:
    """The parser's reading, or the plain text where it fails: sampled ids may be anything."""
    try:
        return parser.parse(prompt_ids, completion_ids, tools)
    except Exception:  # noqa: BLE001 - a parser meets what no grammar foresaw; the text itself is then the message
        return Parsed(safe_decode(decode, completion_ids))


def safe_decode(decode: Decode, ids: Sequence[int]) -> str:
    """The text of the ids; empty where some are outside the vocabulary."""
    try:
        return decode(ids)
    except (OverflowError, TypeError, ValueError, KeyError, IndexError):
        return ""


class TagParser:
    """`<think>` and the common tool-call shapes, each only where the template's text contains it."""

    name = "template"
    stop_token_ids: Ids = ()

    def __init__(self, template: ChatTemplate) -> None:
        source = template.source
        self._template = template
        self._thinks = "</think>" in source
        self._tags = "<tool_call>" in source
        self._key_values = "<arg_key>" in source
        self._bare_json = not self._tags and '{"name": "' in source and '"parameters": ' in source
        special = (template.decode([token]) for token in template.special_ids)
        self._special = {text for text in special if text and "think" not in text and "tool_call" not in text}

    def parse(self, prompt_ids: Sequence[int], completion_ids: Sequence[int], tools: Sequence[Tool]) -> Parsed:
        text = self._template.decode(completion_ids)
        reasoning = None
        if self._thinks:
            reasoning, text = self._split(self._template.opening(prompt_ids), text)
        calls: list[ToolCall] = []
        if tools and self._tags:
            text = _CALL.sub(lambda match: self._read_or_keep(match, tools, calls), text)
        elif tools and self._bare_json and (call := _json_call(self._clean(text))):
            calls, text = [call], ""
        content = self._clean(text)
        return Parsed(content.strip() if calls or reasoning else content, reasoning, tuple(calls))

    def _split(self, prompt: str, text: str) -> tuple[str | None, str]:
        opened = prompt.rfind("<think>") > prompt.rfind("</think>")
        start = text.lstrip()
        if not opened and not start.startswith("<think>"):
            return None, text
        body = start.removeprefix("<think>")
        thought, closed, rest = body.partition("</think>")
        return self._clean(thought).strip() or None, rest if closed else ""

    def _read_or_keep(self, match: re.Match[str], tools: Sequence[Tool], calls: list[ToolCall]) -> str:
        call = _json_call(match[1]) or _function_call(match[1], tools)
        if call is None and self._key_values:
            call = _key_value_call(match[1], tools)
        if call is None:
            return match[0]
        calls.append(call)
        return ""

    def _clean(self, text: str) -> str:
        for token in self._special:
            text = text.replace(token, "")
        return text


class TemplateParser:
    """The tokenizer's own `parse_response`."""

    name = "template"
    stop_token_ids: Ids = ()

    def __init__(self, template: ChatTemplate) -> None:
        self._tokenizer: Any = template.tokenizer
        self._fallback = TagParser(template)

    def parse(self, prompt_ids: Sequence[int], completion_ids: Sequence[int], tools: Sequence[Tool]) -> Parsed:
        if not tools or not completion_ids:
            return self._fallback.parse(prompt_ids, completion_ids, ())
        try:
            message: Message = self._tokenizer.parse_response(
                list(completion_ids), prefix=list(prompt_ids[-PROMPT_TAIL:]), tools=[dict(tool) for tool in tools]
            )
        except Exception:  # noqa: BLE001 - a response template is somebody's grammar; what it refuses is content
            return self._fallback.parse(prompt_ids, completion_ids, ())
        calls = tuple(_from_message(call) for call in tool_calls_of(message))
        if not all(call.name for call in calls):
            return self._fallback.parse(prompt_ids, completion_ids, ())
        reasoning = next((message[key] for key in ("reasoning_content", "thinking") if message.get(key)), None)
        return Parsed(str(message.get("content") or ""), reasoning, calls)


def read_arguments(arguments: Any) -> str:
    """Arguments as JSON text."""
    return arguments if isinstance(arguments, str) else orjson.dumps(arguments or {}, default=str).decode()


def _from_message(call: Mapping[str, Any]) -> ToolCall:
    function = call.get("function") or call
    return ToolCall(str(function.get("name") or ""), read_arguments(function.get("arguments")), call.get("id"))


def _json_call(text: str) -> ToolCall | None:
    try:
        value = orjson.loads(text.strip())
    except orjson.JSONDecodeError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    return ToolCall(value["name"], read_arguments(arguments)) if isinstance(arguments, (dict, str)) else None


def _function_call(text: str, tools: Sequence[Tool]) -> ToolCall | None:
    match = _FUNCTION.fullmatch(text)
    if match is None:
        return None
    name = match[1].strip()
    if not _NAME.fullmatch(name):
        return None
    arguments = {key.strip(): _typed(value, name, key.strip(), tools) for key, value in _PARAMETER.findall(match[2])}
    return ToolCall(name, read_arguments(arguments))


def _key_value_call(text: str, tools: Sequence[Tool]) -> ToolCall | None:
    name = text.partition("<arg_key>")[0].strip()
    if not _NAME.fullmatch(name):
        return None
    arguments = {key.strip(): _typed(value, name, key.strip(), tools) for key, value in _KEY_VALUE.findall(text)}
    return ToolCall(name, read_arguments(arguments))


def _typed(value: str, name: str, key: str, tools: Sequence[Tool]) -> Any:
    """XML-like formats write values bare: the tool's own schema says whether `7` is a number or text."""
    for tool in tools:
        function = tool.get("function") or {}
        if function.get("name") == name:
            schema = ((function.get("parameters") or {}).get("properties") or {}).get(key) or {}
            if schema.get("type") == "string":
                return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return value
