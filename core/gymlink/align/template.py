"""What writes a tokenizer's conversations, spoken to in its own dialect.

Templates differ in what they accept: arguments of a tool call as a mapping or as JSON text, content as a string or as
parts, the role `developer` or only `system`. The dialect is found by probing, once; after that every message is put
into it, and one that would drop a message without a word refuses it instead.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import orjson

from gymlink.align.base import NO_ARGS, Ids, Tokenizer
from gymlink.align.canonical import REASONING_FIELDS, text_of, tool_calls_of
from gymlink.align.encoder import Encoder
from gymlink.errors import AlignmentError, ConfigError
from gymlink.types import Message, Tool

PROBE_TOOL: Final[Tool] = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Looks something up.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}
_TAIL: Final = 1024
_OPENING: Final = 16
MAX_SHAPES: Final = 1024
"""Shapes of conversations that are remembered: far more than there are between two rewritten histories."""
_OURS: Final = frozenset(
    {"add_generation_prompt", "chat_template", "conversation", "return_dict", "return_tensors", "tokenize", "tools"}
)


def probe_call(call_id: str, value: str, key: str = "query") -> dict[str, Any]:
    """A tool call as OpenAI writes it. Some templates insist on ids of nine characters."""
    arguments = orjson.dumps({key: value}).decode()
    return {"id": call_id, "type": "function", "function": {"name": "probe_tool", "arguments": arguments}}


class Template(ABC):
    """Writes conversations for one tokenizer: as its chat template does, or as a hand-made format."""

    title: str
    """What it is, for messages to people."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer)
        self.special_ids = _special_ids(tokenizer)
        self._word = "probe" + secrets.token_hex(4)
        self._lost: dict[tuple[Any, ...], tuple[int, ...]] = {}
        self._parts = False
        self._json_arguments = False
        self._find_dialect()

    @property
    @abstractmethod
    def source(self) -> str:
        """The program that writes, as text."""

    @abstractmethod
    def _write(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool],
        template_args: Mapping[str, Any],
        *,
        generate: bool,
        resumed: bool,
    ) -> tuple[str, Sequence[int] | None]:
        """The conversation as text, and as ids where these are not what `encode` makes of the text.

        `resumed` leaves the last message, an assistant's, open. Raises whatever it likes.
        """

    def encode(self, text: str) -> list[int]:
        return self.encoder.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def opening(self, prompt_ids: Sequence[int]) -> str:
        """The text with which the prompt already began the answer: what follows its last control token."""
        tail = list(prompt_ids[-_TAIL:])
        for place in range(len(tail) - 1, -1, -1):
            if tail[place] in self.special_ids and "think" not in self.decode([tail[place]]):
                return self.decode(tail[place + 1 :])
        return self.decode(tail[-_OPENING:])

    @property
    def writes_tools(self) -> bool:
        """Whether the tools of a request reach the prompt at all."""
        name = str(PROBE_TOOL["function"]["name"])
        try:
            return name in self.text([{"role": "user", "content": "question"}], [PROBE_TOOL])
        except AlignmentError:
            return False

    def ids(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), template_args: Mapping[str, Any] = NO_ARGS
    ) -> Ids:
        """The whole conversation as ids.

        Raises:
            AlignmentError: as `text`.
        """
        return self.written(messages, tools, template_args)[1]

    def written(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        template_args: Mapping[str, Any] = NO_ARGS,
        *,
        answers: bool = True,
    ) -> tuple[str, Ids]:
        """The whole conversation as text and as ids.

        Raises:
            AlignmentError: as `text`.
        """
        text, ids = self._checked(messages, tools, template_args, generate=True, answers=answers)
        return text, tuple(self.encode(text) if ids is None else ids)

    def text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        template_args: Mapping[str, Any] = NO_ARGS,
        *,
        generate: bool = True,
        answers: bool = True,
    ) -> str:
        """The whole conversation as text; with the generation prompt unless the last message is to be continued.

        Without `answers` an assistant's message may be left out: its sampled ids stand in the prompt anyway.

        Raises:
            AlignmentError: the conversation is refused, or something of it would not be written.
        """
        return self._checked(messages, tools, template_args, generate=generate, answers=answers)[0]

    def _checked(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        template_args: Mapping[str, Any],
        *,
        generate: bool,
        answers: bool,
    ) -> tuple[str, Sequence[int] | None]:
        if taken := _OURS & template_args.keys() - {"add_generation_prompt"}:
            raise AlignmentError(f"The template arguments {sorted(taken)} cannot be set by a request; leave them out.")
        args = {key: value for key, value in template_args.items() if key not in _OURS}
        resumed = bool(args.pop("continue_final_message", False)) and _is_last_assistant(messages)
        adapted = [self.adapt(message) for message in messages]
        self._refuse_what_would_vanish(adapted, tools, answers=answers)
        try:
            return self._write(adapted, tools, args, generate=generate and not resumed, resumed=resumed)
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            roles = [message["role"] for message in adapted]
            raise AlignmentError(
                f"{self.title} refuses this conversation ({error}). Its roles are {roles!r}. Change the messages, or "
                "the tokenizer's chat template."
            ) from error

    def adapt(self, message: Message) -> dict[str, Any]:
        """The message in this template's dialect. Non-text content is refused."""
        role = str(message.get("role") or "")
        adapted: dict[str, Any] = {
            key: message[key]
            for key in ("name", "tool_call_id", *REASONING_FIELDS)
            if message.get(key) is not None and (role == "assistant" or key not in REASONING_FIELDS)
        }
        adapted["role"] = "system" if role == "developer" and self.maps_developer else role
        text = _only_text(message.get("content"))
        adapted["content"] = [{"type": "text", "text": text}] if self._parts else text
        if calls := tool_calls_of(message):
            adapted["tool_calls"] = [self._adapt_call(call) for call in calls]
        return adapted

    def _adapt_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        held = call.get("function")
        function = dict(held if isinstance(held, Mapping) else call)
        arguments = function.get("arguments")
        if self._json_arguments:
            function["arguments"] = arguments if isinstance(arguments, str) else orjson.dumps(arguments or {}).decode()
        else:
            function["arguments"] = _as_mapping(arguments)
        return {"type": "function", **({"id": call["id"]} if call.get("id") else {}), "function": function}

    # -- what a template would leave out without a word ----------------------------------------------------------

    def _refuse_what_would_vanish(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], *, answers: bool
    ) -> None:
        """A conversation of this shape is written once with words of its own in each message, and some have to show."""
        shape = (bool(tools), *_shape(messages))
        lost = self._lost.get(shape)
        if lost is None:
            if len(self._lost) >= MAX_SHAPES:
                self._lost.clear()
            lost = self._lost[shape] = self._find_lost(messages, tools)
        for place in lost:
            if messages[place]["role"] == "assistant" and not answers:
                continue
            raise AlignmentError(
                f"{self.title} writes nothing for a message of role {messages[place]['role']!r} (number {place + 1} of "
                f"{len(messages)}), so the model would never see it. Use a template that knows such a message there, "
                "or leave it out."
            )

    def _find_lost(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> tuple[int, ...]:
        """The places of messages of which nothing shows; none where all are refused anyway."""
        probes: list[Message] = []
        for place, message in enumerate(messages):
            word = f"{self._word}{place}x"
            calls = [
                {**call, "function": {**call["function"], "arguments": {"query": word}}}
                for call in tool_calls_of(message)
            ]
            probe = {**message, "content": word if text_of(message["content"]) else ""}
            probes.append({**probe, "tool_calls": calls} if calls else probe)
        text = self._try(probes, tools)
        if text is None:
            return ()
        spoken = (place for place, probe in enumerate(probes) if probe["content"] or tool_calls_of(probe))
        return tuple(place for place in spoken if f"{self._word}{place}x" not in text)

    # -- finding the dialect -------------------------------------------------------------------------------------

    def _find_dialect(self) -> None:
        self.maps_developer = True
        word = self._word
        user: Message = {"role": "user", "content": word}
        if not self._shows(word, [user]):
            self._parts = True
            if not self._shows(word, [user]):
                raise ConfigError(
                    f"{self.title} does not write a plain user message, so no prompt can be made. Check "
                    "`tokenizer.chat_template`."
                )
        asked: Message = {"role": "user", "content": "question"}
        called: Message = {"role": "assistant", "content": "", "tool_calls": [probe_call("call00001", word)]}
        result: Message = {"role": "tool", "tool_call_id": "call00001", "name": "probe_tool", "content": "result"}
        if not self._shows(word, [asked, called, result]):
            self._json_arguments = True
            if not self._shows(word, [asked, called, result]):
                self._json_arguments = False
        quoted = any(quote + "developer" + quote in self.source for quote in ("'", '"'))
        self.maps_developer = not (quoted and self._shows(word, [{"role": "developer", "content": word}, asked]))

    def _try(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str | None:
        try:
            return self._write(list(map(self.adapt, messages)), tools, {}, generate=True, resumed=False)[0]
        except Exception:  # noqa: BLE001 - see `text`
            return None

    def _shows(self, word: str, messages: Sequence[Message]) -> bool:
        tools = [PROBE_TOOL] if messages[-1]["role"] == "tool" else []
        return word in (self._try(messages, tools) or "")


class ChatTemplate(Template):
    """A tokenizer's own chat template.

    Raises:
        ConfigError: the tokenizer has no chat template, or one that renders no plain conversation.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"The tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template, so messages cannot be "
                "turned into a prompt. Set `tokenizer.chat_template` (or put chat_template.jinja into the model's "
                "folder), or name the format: `alignment.format: qwen3`."
            )
        self.title = f"The chat template of {tokenizer.name_or_path!r}"
        super().__init__(tokenizer)

    @property
    def source(self) -> str:
        """The template's text; every named template when the tokenizer holds several."""
        held = self.tokenizer.chat_template
        return held if isinstance(held, str) else "\n".join(map(str, getattr(held, "values", list)()))

    def _write(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool],
        template_args: Mapping[str, Any],
        *,
        generate: bool,
        resumed: bool,
    ) -> tuple[str, Sequence[int] | None]:
        text = self.tokenizer.apply_chat_template(
            list(messages),
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=generate,
            **({"continue_final_message": True} if resumed else {}),
            **template_args,
        )
        return str(text), None


def _shape(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Any, ...]]:
    """What a template may look at, but for the words."""
    called: set[Any] = set()
    for message in messages:
        calls = tool_calls_of(message)
        called.update(call.get("id") for call in calls)
        yield (
            message["role"],
            bool(text_of(message["content"])),
            len(calls),
            any(message.get(name) for name in REASONING_FIELDS),
            "name" in message,
            message.get("tool_call_id") in called,
        )


def _is_last_assistant(messages: Sequence[Message]) -> bool:
    return bool(messages) and messages[-1].get("role") == "assistant"


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of control tokens. Added tokens marked special count too: tokenizers do not list them all by name."""
    named = [tokenizer.eos_token_id, *(getattr(tokenizer, "all_special_ids", None) or ())]
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return frozenset(
        [token for token in named if isinstance(token, int)]
        + [index for index, token in added.items() if getattr(token, "special", False)]
    )


def _only_text(content: Any) -> str:
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        kinds = {str(part.get("type")) for part in content if isinstance(part, Mapping)}
        if other := {kind for kind in kinds if "text" not in kind and kind not in ("None", "thinking", "refusal")}:
            raise AlignmentError(f"Message content of type {sorted(other)} is not text; only text can be aligned.")
    return text_of(content)


def _as_mapping(arguments: Any) -> Any:
    """Most templates walk over a call's arguments: JSON text becomes the object it says, when it says one."""
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        read = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
    return read if isinstance(read, dict) else arguments
