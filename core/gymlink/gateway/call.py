"""One call of the policy, and its answer, whatever dialect an agent speaks.

A dialect translates its request into a `Call` and an `Answer` into its own body; the service knows nothing else. The
message of an answer is kept in chat-completions form, and each dialect's history is read back into that form, so that
what was sampled is found again however the agent echoes it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from gymlink.align import Check, Parsed
from gymlink.gateway.wire import invalid
from gymlink.types import Message, TokenIds, Tool, Turn


@dataclass(frozen=True, slots=True)
class Thread:
    """A conversation that a later call may go on with by naming its last answer. It holds what it adds."""

    added: Sequence[Message]
    extends: Thread | None = None
    length: int = field(init=False)
    """How many messages it has."""

    def __post_init__(self) -> None:
        before = 0 if self.extends is None else self.extends.length
        object.__setattr__(self, "length", before + len(self.added))

    @property
    def messages(self) -> list[Message]:
        """All of them, put together with each access."""
        threads = [self]
        while (before := threads[-1].extends) is not None:
            threads.append(before)
        return [message for thread in reversed(threads) for message in thread.added]


@dataclass(frozen=True, slots=True)
class Call:
    """What an agent asks the policy."""

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    """Those to show to the policy."""
    template_args: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template is called with, beside messages and tools."""
    token_limit: int | None = None
    required_prefix: TokenIds | None = None
    """Ids that the prompt must start with."""
    thread: Thread | None = None
    """The conversation that the answer belongs to, without instructions; None where nobody can go on from an answer."""
    is_stored: bool = True
    """Whether a later call may go on from the answer."""
    check: Check | None = None
    """Refuses, with `WireError` 400, messages that came as they are; None where they were checked as they were read."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the policy said. `key` names it: the ids in every dialect are made of it."""

    key: str
    turn: Turn
    parsed: Parsed
    message: dict[str, Any]
    """In chat-completions form, without token ids."""
    model: str
    created: int

    @property
    def calls(self) -> Sequence[Mapping[str, Any]]:
        """Its tool calls, in chat-completions form."""
        calls: Sequence[Mapping[str, Any]] = self.message.get("tool_calls", ())
        return calls

    @property
    def cut(self) -> bool:
        """Whether it was ended by something else than the policy."""
        return self.turn.finish_reason != "stop"

    @classmethod
    def of(cls, turn: Turn, parsed: Parsed, message: dict[str, Any], *, key: str, model: str) -> Answer:
        return cls(key, turn, parsed, message, model, int(time.time()))


class Asked(Protocol):
    """A request in some dialect, which knows how its answer is written."""

    @property
    def stream(self) -> bool | None:
        """Whether the answer is wanted as events."""

    def call(self, threads: Mapping[str, Thread]) -> Call:
        """What it asks. `threads` are the answers that it may go on from, by key. Raises `WireError` 400."""

    def without_conversation(self) -> Self:
        """What is needed of it to write the answer."""

    def body(self, answer: Answer) -> dict[str, Any]:
        """The answer as one JSON object."""

    def events(self, answer: Answer) -> Iterable[tuple[str | None, Any]]:
        """The answer as server-sent events: name, if the dialect names them, and data."""


def new_key() -> str:
    """A name that no other answer has."""
    return uuid.uuid4().hex


def assistant_message(parsed: Parsed, key: str) -> dict[str, Any]:
    """A sampled completion as a chat-completions message, without token ids.

    The ids of its tool calls have nine letters and digits, because some chat templates (Mistral's) take no other; they
    are unique within a rollout.
    """
    message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
    if parsed.reasoning:
        # vLLM renamed the field in 0.16; Gym 0.4 reads either.
        message["reasoning_content"] = message["reasoning"] = parsed.reasoning
    if parsed.tool_calls:
        message["content"] = parsed.content or None
        message["tool_calls"] = [
            {
                "id": call.id or f"{key[:7]}{index:02x}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for index, call in enumerate(parsed.tool_calls)
        ]
    return message


def shown_tools(tools: Sequence[Tool], choice: Any) -> Sequence[Tool]:
    """The tools to show to the policy: none when the request forbids calling any.

    Raises `WireError` 400 for a choice that would force a call.
    """
    if choice not in (None, "auto", "none"):
        raise invalid(
            f"tool_choice {choice!r} is not supported: use 'auto' or 'none'. Forcing a call would sample from another "
            "distribution than the one that is trained.",
            "tool_choice",
        )
    return () if choice == "none" else tools
