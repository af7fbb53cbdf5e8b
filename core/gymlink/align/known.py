"""Formats that `renderers` writes and reads by hand, adapted to this package.

A hand-made format is taken for a tokenizer only when it renders every probe conversation to the very ids that the
tokenizer's own template gives; a model's name alone proves nothing, and a fine-tune's folder has none.
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Final

from renderers import base as _renderers  # type: ignore[import-untyped]
from renderers.configs import config_from_name  # type: ignore[import-untyped]

from gymlink.align.base import NO_ARGS, Ids, Parsed, Tokenizer, ToolCall
from gymlink.align.canonical import digest, lasting_args
from gymlink.align.parsing import PROMPT_TAIL, read_arguments
from gymlink.align.template import PROBE_TOOL, ChatTemplate, Template, probe_call
from gymlink.errors import AlignmentError, ConfigError
from gymlink.types import Message, Tool

MARKER_LENGTH: Final = 64
"""Characters that a marker has at most."""
_OPEN: Final = "Zq" + secrets.token_hex(12)


class _Remembering:
    """A tokenizer for `renderers`, which asks it for the ids of the same few markers with each completion."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer: Any = tokenizer
        self._ids = lru_cache(maxsize=256)(self._encoded)

    def _encoded(self, text: str) -> Ids:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def encode(self, text: str, **options: Any) -> list[int]:
        if options != {"add_special_tokens": False} or len(text) > MARKER_LENGTH:
            return list(self._tokenizer.encode(text, **options))
        return list(self._ids(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        return self._tokenizer(*texts, **options)


class KnownParser:
    """Reads completions with a hand-made format."""

    def __init__(self, name: str, renderer: _renderers.Renderer, tokenizer: Tokenizer) -> None:
        self.name = f"renderers:{name}"
        self.stop_token_ids: Ids = tuple(renderer.get_stop_token_ids())
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


class KnownTemplate(Template):
    """A hand-made format in a template's place, for a tokenizer without one or at the user's word.

    Raises:
        ConfigError: there is no format of this name, or the tokenizer lacks its tokens.
    """

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        if name not in known_names():
            raise ConfigError(f"There is no chat format {name!r}. Known are: template, {', '.join(known_names())}.")
        self._format = name
        self._renderers: dict[bytes, _renderers.Renderer] = {}
        self.tokenizer = tokenizer
        self.title = f"The chat format {name!r}"
        try:
            self.parser = KnownParser(name, self._renderer(NO_ARGS), tokenizer)
        except Exception as error:  # a missing token is an AssertionError there
            raise ConfigError(
                f"The chat format {name!r} does not fit the tokenizer {tokenizer.name_or_path!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        super().__init__(tokenizer)

    @property
    def source(self) -> str:
        """The text of the module that defines the format."""
        module = inspect.getmodule(type(self._renderer(NO_ARGS)))
        return inspect.getsource(module) if module else ""

    def _write(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool],
        template_args: Mapping[str, Any],
        *,
        generate: bool,
        resumed: bool,
    ) -> tuple[str, Sequence[int] | None]:
        if not resumed:
            ids = self._ids(messages, tools, template_args, generate=generate)
            return self.decode(ids), ids
        left_open = {**messages[-1], "content": messages[-1]["content"] + _OPEN}
        before, found, _ = self.decode(
            self._ids([*messages[:-1], left_open], tools, template_args, generate=False)
        ).rpartition(_OPEN)
        if not found:
            raise ValueError("its last message is not written, so it cannot be continued")
        return before, None

    def _ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool],
        template_args: Mapping[str, Any],
        *,
        generate: bool,
    ) -> list[int]:
        renderer = self._renderer(template_args)
        return list(
            renderer.render_ids(
                [_plain(message) for message in messages], tools=_specs(tools), add_generation_prompt=generate
            )
        )

    def _renderer(self, template_args: Mapping[str, Any]) -> _renderers.Renderer:
        lasting = lasting_args(template_args)
        key = digest(lasting)
        if key not in self._renderers:
            self._renderers[key] = _make(self.tokenizer, self._format, lasting)
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
    return _renderers.create_renderer(_Remembering(tokenizer), config, chat_template_kwargs=dict(template_args) or None)


def _ids(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Tool]) -> Ids | None:
    try:
        return template.ids(messages, tools, NO_ARGS)
    except AlignmentError:
        return None


def _specs(tools: Sequence[Tool]) -> Any:
    return [dict(tool) for tool in tools] or None


def _plain(message: Mapping[str, Any]) -> Any:
    return {"content": "", **{key: value for key, value in message.items() if value not in (None, [])}}


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
