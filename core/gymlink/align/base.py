"""A chat format: messages to token ids, and sampled ids back to a message.

The promise of every format: what `extend` returns is proven to be what the chat template writes after a sampled turn,
and where that cannot be proven it returns None. Sampled ids are never tokenized again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from gymlink.types import FinishReason, Message, Tool

Ids = tuple[int, ...]
"""Token ids as a format makes and takes them: few at a time, but for a whole render."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call that the policy sampled and that could be read. `arguments` is JSON text, as for OpenAI."""

    name: str
    arguments: str
    id: str | None = None
    """The id that the format itself writes, if it writes one."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a sampled completion says. A tool call that cannot be read stays in the content, word for word."""

    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


NO_ARGS: Mapping[str, Any] = {}


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is needed. Any object with these members will do."""

    name_or_path: str
    eos_token_id: Any
    chat_template: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...

    def encode(self, text: str, **kwargs: Any) -> list[int]: ...

    def decode(self, token_ids: Any, **kwargs: Any) -> str: ...

    def convert_tokens_to_ids(self, tokens: Any) -> Any: ...


@runtime_checkable
class ChatFormat(Protocol):
    """How one model's conversations are written as token ids."""

    @property
    def name(self) -> str:
        """`template`, or `renderers:<its name there>`."""

    @property
    def stop_token_ids(self) -> Ids:
        """Ids that end a sampled turn."""

    @property
    def writes_tools(self) -> bool:
        """Whether the tools of a request reach the prompt at all: many templates ignore them without a word."""

    def encode(self, text: str) -> Ids:
        """The ids of a text, with nothing added around it. Control tokens are read where it spells them."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens included; empty where some are outside the vocabulary."""

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, template_args: Mapping[str, Any] = NO_ARGS
    ) -> Ids:
        """The whole conversation, up to and including the generation prompt.

        With `template_args["continue_final_message"]` the last message, an assistant's, is left open instead.

        Raises:
            AlignmentError: the template refuses the conversation, or would lose a message without saying so.
        """

    def extend(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        finish_reason: FinishReason,
        new_messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        template_args: Mapping[str, Any] = NO_ARGS,
        answered: Message | None = None,
    ) -> Ids | None:
        """The ids that follow `prompt_ids + completion_ids` for `new_messages`, up to the next generation prompt.

        They close the turn where sampling did not. `answered` is the sampled message itself: some templates name the
        called tool in its result. None where no continuation is proven for these messages.
        """

    def parse(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        tools: Sequence[Tool] = (),
        *,
        template_args: Mapping[str, Any] = NO_ARGS,
    ) -> Parsed:
        """What the completion says. Never raises, whatever was sampled; tool calls only where `tools` are given."""


@dataclass(frozen=True, slots=True)
class FormatReport:
    """What was proven about a tokenizer's template when it was loaded, for `gymlink doctor`."""

    extends: tuple[str, ...]
    """Kinds of new messages after which the next prompt is an exact extension."""
    forks: tuple[str, ...]
    """Kinds after which a new branch starts."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Kinds that the template itself does not write, and why."""
    writes_tools: bool = True
    """Whether the tools of a request are written into the prompt; a template may leave them out without a word."""
