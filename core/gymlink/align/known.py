"""Formats that `renderers` writes and reads by hand, adapted to this package.

A hand-made format is taken for a tokenizer only when it renders every probe conversation to the very ids that the
tokenizer's own template gives; a model's name alone proves nothing, and a fine-tune's folder has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from renderers import base as _renderers  # type: ignore[import-untyped]
from renderers.configs import config_from_name  # type: ignore[import-untyped]

from gymlink.align.base import NO_ARGS, Parsed, Tokenizer, ToolCall
from gymlink.align.canonical import digest, lasting_args, text_of
from gymlink.align.parsing import PROMPT_TAIL, read_arguments, safe_parse
from gymlink.align.template import PROBE_TOOL, ChatTemplate, probe_call
from gymlink.errors import AlignmentError, ConfigError
from gymlink.types import FinishReason, Message, TokenIds, Tool


class KnownParser:
    """Reads completions with a hand-made format."""

    def __init__(self, name: str, renderer: _renderers.Renderer, tokenizer: Tokenizer) -> None:
        self.name = f"renderers:{name}"
        self.stop_token_ids: TokenIds = tuple(renderer.get_stop_token_ids())
        self._renderer = renderer
        self._tokenizer = tokenizer

    def parse(self, prompt_ids: Sequence[int], completion_ids: Sequence[int], tools: Sequence[Tool]) -> Parsed:
        ids = list(completion_ids)
        specs: Any = [dict(tool) for tool in tools] or None
        read = self._renderer.parse_response(ids, tools=specs, prompt_ids=list(prompt_ids[-PROMPT_TAIL:]))
        calls, kept = [], []
        for attempt in read.tool_calls:
            if tools and attempt.status == _renderers.ToolCallParseStatus.OK and attempt.name:
                calls.append(ToolCall(attempt.name, read_arguments(attempt.arguments), attempt.id))
            elif attempt.token_span is not None:
                kept.append(self._tokenizer.decode(ids[slice(*attempt.token_span)], skip_special_tokens=False))
            else:
                kept.append(attempt.raw)
        return Parsed(read.content + "".join(kept), read.reasoning_content or None, tuple(calls))


class KnownFormat:
    """A hand-made format on its own, for a tokenizer without a template or at the user's word."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        if name not in known_names():
            raise ConfigError(f"There is no chat format {name!r}. Known are: template, {', '.join(known_names())}.")
        self._tokenizer = tokenizer
        self._format = name
        self._renderers: dict[bytes, _renderers.Renderer] = {}
        try:
            self._parser = KnownParser(name, self._renderer(NO_ARGS), tokenizer)
        except AlignmentError as error:
            raise ConfigError(
                f"The chat format {name!r} does not fit the tokenizer {tokenizer.name_or_path!r}: {error}"
            ) from error
        self.name = self._parser.name

    @property
    def stop_token_ids(self) -> TokenIds:
        """Ids that end a turn in this format."""
        return self._parser.stop_token_ids

    @property
    def writes_tools(self) -> bool:
        """Every hand-made format writes tools."""
        return True

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, template_args: Mapping[str, Any] = NO_ARGS
    ) -> TokenIds:
        """See `ChatFormat.render`."""
        renderer = self._renderer(template_args)
        resumed = bool(template_args.get("continue_final_message")) and messages[-1].get("role") == "assistant"
        shown = [_plain(message) for message in (messages[:-1] if resumed else messages)]
        try:
            ids = renderer.render_ids(shown, tools=_specs(tools), add_generation_prompt=True)
        except Exception as error:  # whatever a hand-made format raises on odd messages
            raise AlignmentError(f"The chat format {self.name!r} refuses this conversation: {error}") from error
        text = text_of(messages[-1].get("content")) if resumed else ""
        return (*ids, *(self._tokenizer.encode(text, add_special_tokens=False) if text else ()))

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
    ) -> TokenIds | None:
        """See `ChatFormat.extend`; proven by the format's own bridge, on the end of the prompt alone."""
        if template_args.get("continue_final_message"):
            ended = bool(completion_ids) and completion_ids[-1] in self.stop_token_ids
            return () if not new_messages and not ended else None
        if finish_reason == "abort":
            return None
        tail = [*prompt_ids[-PROMPT_TAIL:]]
        names = {
            call.get("id"): call.get("function", call).get("name") for call in (answered or {}).get("tool_calls") or ()
        }
        shown = [_plain(message, names.get(message.get("tool_call_id"))) for message in new_messages]
        try:
            bridged = self._renderer(template_args).bridge_to_next_turn(
                tail, list(completion_ids), shown, tools=_specs(tools)
            )
        except Exception:  # noqa: BLE001 - a bridge that fails has proven nothing
            return None
        held = [*tail, *completion_ids]
        if bridged is None or bridged.token_ids[: len(held)] != held:
            return None
        return tuple(bridged.token_ids[len(held) :])

    def parse(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        tools: Sequence[Tool] = (),
        *,
        template_args: Mapping[str, Any] = NO_ARGS,  # noqa: ARG002 - what the arguments opened stands in the prompt
    ) -> Parsed:
        """See `ChatFormat.parse`."""
        return safe_parse(self._parser, self._decode, prompt_ids, completion_ids, tools)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _renderer(self, template_args: Mapping[str, Any]) -> _renderers.Renderer:
        lasting = lasting_args(template_args)
        key = digest(lasting)
        if key not in self._renderers:
            try:
                self._renderers[key] = _make(self._tokenizer, self._format, lasting)
            except Exception as error:  # a missing token is an AssertionError there, a bad argument a ValueError
                raise AlignmentError(f"{type(error).__name__}: {error}") from error
        return self._renderers[key]


def recognise(template: ChatTemplate) -> KnownParser | None:
    """The hand-made format that writes what this template writes, on every probe; None where there is none."""
    tokenizer = template.tokenizer
    expected = [(messages, tools, ids) for messages, tools in _probes() if (ids := _ids(template, messages, tools))]
    if not expected:
        return None
    likely = _renderers.MODEL_RENDERER_MAP.get(tokenizer.name_or_path)
    for name in sorted(known_names(), key=lambda known: known != likely):
        try:
            renderer = _make(tokenizer, name, {})
            if all(
                tuple(
                    renderer.render_ids(
                        [_plain(template.adapt(message)) for message in messages],
                        tools=_specs(tools),
                        add_generation_prompt=True,
                    )
                )
                == ids
                for messages, tools, ids in expected
            ):
                return KnownParser(name, renderer, tokenizer)
        except Exception:  # noqa: BLE001, S112 - it lacks a token or refuses a probe: it is another model's format
            continue
    return None


@cache
def known_names() -> tuple[str, ...]:
    """Names of the formats that `renderers` knows."""
    _renderers._populate_registry()
    return tuple(name for name in _renderers.RENDERER_REGISTRY if name != "default")


def _make(tokenizer: Tokenizer, name: str, template_args: Mapping[str, Any]) -> _renderers.Renderer:
    config: Any = config_from_name(name)
    for retention in ({"thinking_retention": "all"}, {}):
        try:
            kept = type(config)(**retention)
            return _renderers.create_renderer(tokenizer, kept, chat_template_kwargs=dict(template_args) or None)
        except ValueError:
            if not retention:
                raise
    raise AssertionError("unreachable")


def _ids(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Tool]) -> TokenIds | None:
    try:
        return template.ids(messages, tools, NO_ARGS)
    except AlignmentError:
        return None


def _specs(tools: Sequence[Tool]) -> Any:
    return [dict(tool) for tool in tools] or None


def _plain(message: Message, name: Any = None) -> Any:
    plain = {key: value for key, value in message.items() if value not in (None, [])}
    plain.setdefault("content", "")
    if name and plain.get("role") == "tool":
        plain.setdefault("name", name)
    return plain


def _probes() -> Iterator[tuple[list[Message], list[Tool]]]:
    user: Message = {"role": "user", "content": " a question?\n"}
    system: Message = {"role": "system", "content": "some rules"}
    answer: Message = {"role": "assistant", "content": "an answer"}
    thought: Message = {"role": "assistant", "content": "an answer", "reasoning_content": "a thought"}
    call: Message = {"role": "assistant", "content": "", "tool_calls": [probe_call("call00001", "this")]}
    calls: Message = {
        "role": "assistant",
        "content": "first a look",
        "reasoning_content": "a thought",
        "tool_calls": [probe_call("call00001", "this"), probe_call("call00002", "that")],
    }
    result: Message = {"role": "tool", "tool_call_id": "call00001", "name": "probe_tool", "content": "found"}
    second: Message = {"role": "tool", "tool_call_id": "call00002", "name": "probe_tool", "content": '{"n": 1}'}
    tools = [PROBE_TOOL]
    yield [user], []
    yield [system, user], []
    yield [user], tools
    yield [system, user, answer, user], []
    yield [user, thought, user], []
    yield [system, user, call, result], tools
    yield [user, calls, result, second], tools
    yield [user, calls, result, second, thought, user], tools
