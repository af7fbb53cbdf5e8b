"""When two messages are the same message.

Agents and servers re-word what they echo without changing it: None for an empty string, content parts for a string,
another spacing or key order in a tool call's arguments, reasoning moved between its field and `<think>` tags, or
dropped. `canonical` removes those differences. Equal digests mean the same message up to its reasoning, which is
compared apart because a missing one counts as a match. Ids and logprobs on a message never take part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import chain
from typing import Any, Final

import orjson

from gymlink.types import Message, Tool

ID_FIELDS: Final = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")
"""What Gym asks for on a message, and sends back on the next turn."""
REASONING_FIELDS: Final = ("reasoning_content", "reasoning", "thinking")
_LEADING_THINK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
_JSON = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS


@dataclass(frozen=True, slots=True)
class Canonical:
    """A message without its accidents. `reasoning` is None when the message carries none."""

    role: str
    content: str
    reasoning: str | None
    calls: tuple[tuple[str, str], ...]
    """Tool calls as (name, canonical JSON of the arguments)."""

    @property
    def is_silent(self) -> bool:
        """An assistant message without content or calls. NeMo Gym 0.4.0 drops it from the history it sends back."""
        return self.role == "assistant" and not (self.content or self.calls)

    @property
    def digest(self) -> bytes:
        """16 bytes over everything but the reasoning. Tool-call ids do not take part: agents make them up anew."""
        whole = blake2b(digest_size=16)
        for text in (self.role, self.content, *chain.from_iterable(self.calls)):
            part = text.encode(
                "utf-8", "surrogatepass"
            )  # orjson would leave it beside the text, for as long as that is
            whole.update(len(part).to_bytes(8, "little"))
            whole.update(part)
        return whole.digest()


def digest(value: Any) -> bytes:
    """16 bytes that are equal for equal JSON values, whatever their spacing and key order."""
    return blake2b(_dumps(value), digest_size=16).digest()


def canonical(message: Message) -> Canonical:
    """The canonical form of one chat message. Never raises on a mapping."""
    role = str(message.get("role") or "")
    content = text_of(message.get("content"))
    reasoning: str | None = None
    if role == "assistant":
        content, reasoning = split_reasoning(message)
    return Canonical(
        role="system" if role == "developer" else role,
        content=content,
        reasoning=reasoning,
        calls=tuple(_call(call) for call in tool_calls_of(message)),
    )


def split_reasoning(message: Message) -> tuple[str, str | None]:
    """(content, reasoning) of an assistant message, both stripped; reasoning None when there is none.

    Reasoning in its own field wins; otherwise every leading `<think>...</think>` of the content is reasoning, which is
    how NeMo Gym writes it (one pair of tags for each part).
    """
    content = text_of(message.get("content"))
    parts = [text_of(message[field]) for field in REASONING_FIELDS if message.get(field)][:1]
    position = 0
    while match := _LEADING_THINK.match(content, position):
        parts.append(match[1])
        position = match.end()
    reasoning = "\n".join(dict.fromkeys(part.strip() for part in parts if part.strip()))
    return content[position:].strip(), reasoning or None


def text_of(content: Any) -> str:
    """The text of a message's content, which may be None, a string, or a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Iterable) and not isinstance(content, Mapping):
        return "".join(_part_text(part) for part in content)
    return _dumps(content).decode()


def tool_calls_of(message: Message) -> Sequence[Mapping[str, Any]]:
    """The tool calls of a message that are mappings; empty for None, a missing field or nonsense."""
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        return ()
    return [call for call in calls if isinstance(call, Mapping)]


def tools_digest(tools: Sequence[Tool], template_args: Mapping[str, Any]) -> bytes:
    """What a prompt depends on besides its messages. Prefilling the last message is not part of it."""
    return digest([list(tools), lasting_args(template_args)])


def lasting_args(template_args: Mapping[str, Any]) -> dict[str, Any]:
    """The template's arguments that hold for a whole conversation, not for one call of it."""
    return {key: value for key, value in template_args.items() if key not in _PER_CALL_ARGS}


_PER_CALL_ARGS: Final = frozenset({"continue_final_message", "add_generation_prompt"})


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        for key in ("text", "thinking"):
            if isinstance(part.get(key), str):
                return str(part[key])
    return _dumps(part).decode()


def _call(call: Mapping[str, Any]) -> tuple[str, str]:
    function = call.get("function")
    body = function if isinstance(function, Mapping) else call
    arguments = body.get("arguments")
    text = arguments if isinstance(arguments, str) else _dumps(arguments if arguments is not None else {}).decode()
    return str(body.get("name") or ""), _canonical_json(text)


@lru_cache(maxsize=4096)
def _canonical_json(text: str) -> str:
    try:
        return _dumps(orjson.loads(text or "{}")).decode()
    except orjson.JSONDecodeError:
        return text.strip()


def _dumps(value: Any) -> bytes:
    try:
        return orjson.dumps(value, default=repr, option=_JSON)
    except TypeError:  # a lone surrogate, or an integer beyond 64 bits
        return repr(value).encode("utf-8", "surrogatepass")
