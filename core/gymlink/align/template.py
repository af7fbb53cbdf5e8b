"""A tokenizer's chat template, spoken to in its own dialect.

Templates differ in what they accept: arguments of a tool call as a mapping or as JSON text, content as a string or as
parts, the role `developer` or only `system`. The dialect is found by probing, once; after that every message is put
into it, and a template that would drop a message says so instead of dropping it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from gymlink.align.base import NO_ARGS, Tokenizer
from gymlink.align.canonical import REASONING_FIELDS, text_of, tool_calls_of
from gymlink.errors import AlignmentError, ConfigError
from gymlink.types import Message, TokenIds, Tool

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
_OURS: Final = frozenset(
    {"add_generation_prompt", "chat_template", "conversation", "return_dict", "return_tensors", "tokenize", "tools"}
)


def probe_call(call_id: str, value: str, key: str = "query") -> dict[str, Any]:
    """A tool call as OpenAI writes it. Some templates insist on ids of nine characters."""
    arguments = orjson.dumps({key: value}).decode()
    return {"id": call_id, "type": "function", "function": {"name": "probe_tool", "arguments": arguments}}


class ChatTemplate:
    """Renders messages as the tokenizer's own template does.

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
        self.tokenizer = tokenizer
        self.special_ids = _special_ids(tokenizer)
        self._parts = False
        self._json_arguments = False
        self._find_dialect()

    @property
    def source(self) -> str:
        """The template's text; every named template when the tokenizer holds several."""
        held = self.tokenizer.chat_template
        return held if isinstance(held, str) else "\n".join(map(str, getattr(held, "values", list)()))

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

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

    def ids(self, messages: Sequence[Message], tools: Sequence[Tool], template_args: Mapping[str, Any]) -> TokenIds:
        """The whole conversation as ids.

        Raises:
            AlignmentError: as `text`.
        """
        return tuple(self.encode(self.text(messages, tools, template_args)))

    def text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        template_args: Mapping[str, Any] = NO_ARGS,
        *,
        generate: bool = True,
    ) -> str:
        """The whole conversation as text; with the generation prompt unless the last message is to be continued.

        Raises:
            AlignmentError: the template refuses the conversation or does not write one of its roles.
        """
        if taken := _OURS & template_args.keys() - {"add_generation_prompt"}:
            raise AlignmentError(f"The template arguments {sorted(taken)} cannot be set by a request; leave them out.")
        for role in {str(message.get("role")) for message in messages} & self.dropped_roles.keys():
            raise AlignmentError(self.dropped_roles[role])
        return self._render([self.adapt(message) for message in messages], tools, template_args, generate=generate)

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

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool],
        template_args: Mapping[str, Any],
        *,
        generate: bool,
    ) -> str:
        args = {key: value for key, value in template_args.items() if key not in _OURS}
        resumed = args.pop("continue_final_message", False)
        if resumed and messages and messages[-1]["role"] == "assistant":
            args["continue_final_message"] = resumed
            generate = False
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=generate,
                **args,
            )
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            roles = [message["role"] for message in messages]
            raise AlignmentError(
                f"The chat template of {self.tokenizer.name_or_path!r} refuses this conversation ({error}). Its roles "
                f"are {roles!r}. Change the messages, or the tokenizer's chat template."
            ) from error
        return str(text)

    # -- finding the dialect -------------------------------------------------------------------------------------

    def _find_dialect(self) -> None:
        self.dropped_roles: dict[str, str] = {}
        self.maps_developer = True
        word = "probe" + secrets.token_hex(4)
        user = {"role": "user", "content": word}
        if not self._shows(word, [user]):
            self._parts = True
            if not self._shows(word, [user]):
                raise ConfigError(
                    f"The chat template of {self.tokenizer.name_or_path!r} does not write a plain user message, so no "
                    "prompt can be made. Check `tokenizer.chat_template`."
                )
        asked = {"role": "user", "content": "question"}
        called = {"role": "assistant", "content": "", "tool_calls": [probe_call("call00001", word)]}
        result = {"role": "tool", "tool_call_id": "call00001", "name": "probe_tool", "content": "result"}
        if not self._shows(word, [asked, called, result]):
            self._json_arguments = True
            if not self._shows(word, [asked, called, result]):
                self._json_arguments = False
        quoted = any(quote + "developer" + quote in self.source for quote in ("'", '"'))
        self.maps_developer = not (quoted and self._shows(word, [{"role": "developer", "content": word}, asked]))
        for role in ("system", "tool"):
            self._note_if_dropped(role, word, asked, called)

    def _note_if_dropped(self, role: str, word: str, asked: Message, called: Message) -> None:
        """A role that is refused is the template's own error; one that vanishes would be a silent loss."""
        if role == "system":
            conversations: list[list[Message]] = [[{"role": "system", "content": word}, asked]]
        else:
            result = {"role": "tool", "tool_call_id": "call00001", "name": "probe_tool", "content": word}
            plain = {"role": "assistant", "content": "answer"}
            conversations = [[asked, called, result], [asked, plain, result]]
        rendered = [text for text in map(self._try, conversations) if text is not None]
        if rendered and not any(word in text for text in rendered):
            self.dropped_roles[role] = (
                f"The chat template of {self.tokenizer.name_or_path!r} writes nothing for a message of role {role!r}, "
                "so the model would never see it. Use a template that knows this role, or leave such messages out."
            )
            if role == "system" and self.maps_developer:
                self.dropped_roles["developer"] = self.dropped_roles[role].replace("'system'", "'developer'")

    def _try(self, messages: Sequence[Message]) -> str | None:
        try:
            return self.text(messages, [PROBE_TOOL] if messages[-1]["role"] == "tool" else ())
        except AlignmentError:
            return None

    def _shows(self, word: str, messages: Sequence[Message]) -> bool:
        return word in (self._try(messages) or "")


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
