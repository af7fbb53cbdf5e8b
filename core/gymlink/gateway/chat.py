"""OpenAI's chat completions, with vLLM's additions as NeMo Gym uses them.

Source of the shapes: the OpenAI chat-completions reference, and responses_api_models/vllm_model/app.py of NeMo Gym
0.4.0 and 0.7.0. Token ids are given to who asks for them, and to nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, StrictInt, StrictStr

from gymlink.align import ID_FIELDS
from gymlink.gateway.call import Answer, Call, Thread, shown_tools
from gymlink.gateway.wire import Request, invalid, objects, text_field
from gymlink.types import Message, TokenIds, Tool, Turn


class _TextFormat(BaseModel):
    type: Literal["text"]


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Prompt(Request):
    """What a prompt is made of."""

    model: StrictStr | None = None
    messages: Any
    tools: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    reasoning_effort: StrictStr | None = None

    @property
    def template_args(self) -> dict[str, Any]:
        """What the chat template is called with, beside messages and tools."""
        args: dict[str, Any] = {"reasoning_effort": self.reasoning_effort} if self.reasoning_effort else {}
        args |= self.chat_template_kwargs or {}
        if self.continue_final_message:
            args["continue_final_message"] = True
        elif self.add_generation_prompt is False:
            raise invalid(
                "add_generation_prompt false is supported only together with continue_final_message: the policy "
                "answers, or goes on with the last message.",
                "add_generation_prompt",
            )
        return args

    def _call(self, choice: Any = None, **more: Any) -> Call:
        tools = shown_tools(_checked_tools(self.tools), choice)
        messages = objects(self.messages, "messages")
        if not messages:
            raise invalid("messages: at least one is needed.", "messages")
        return Call(messages, tools, self.template_args, check=_check_message, **more)


class TokenizeRequest(_Prompt):
    """vLLM's `/tokenize`, for messages. What it does not know has no effect on a prompt."""

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> TokenizeRequest:
        known = {name: body[name] for name in cls.model_fields if name in body}
        return super().read(known)

    def call(self) -> Call:
        """The prompt that is asked for."""
        return self._call()


class ChatRequest(_Prompt):
    """A chat completion, as far as this gateway honours it."""

    harmless: ClassVar[frozenset[str]] = frozenset(
        {"metadata", "parallel_tool_calls", "store", "user", "service_tier", "safety_identifier"}
        | {"prompt_cache_key", "prompt_cache_retention"}
    )

    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    required_prefix_token_ids: list[StrictInt] | None = None
    tool_choice: Any = None
    n: Literal[1] | None = None
    response_format: _TextFormat | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    def call(self, threads: Mapping[str, Thread]) -> Call:  # noqa: ARG002 - a chat completion names no earlier answer
        """See `gymlink.gateway.call.Asked`."""
        return self._call(
            self.tool_choice,
            token_limit=self.max_completion_tokens or self.max_tokens,
            required_prefix=self._required_prefix(),
        )

    def _required_prefix(self) -> TokenIds | None:
        try:
            return TokenIds(self.required_prefix_token_ids) if self.required_prefix_token_ids else None
        except ValueError as error:
            raise invalid(f"required_prefix_token_ids: {error}", "required_prefix_token_ids") from error

    @property
    def _wants_ids(self) -> bool:
        return bool(self.return_tokens_as_token_ids or self.return_token_ids or self.required_prefix_token_ids)

    def body(self, answer: Answer) -> dict[str, Any]:
        """See `gymlink.gateway.call.Asked`."""
        turn = answer.turn
        choice: dict[str, Any] = {
            "index": 0,
            "message": {**answer.message, **self._ids(turn)},
            "finish_reason": _finish_reason(answer),
            "logprobs": self._logprobs(turn),
        }
        if self.return_token_ids:
            choice["token_ids"] = turn.completion_ids
        top = {"prompt_token_ids": turn.prompt_ids} if self.return_token_ids else {}
        return {**_head(answer, "chat.completion"), "choices": [choice], "usage": _usage(turn), **top}

    def events(self, answer: Answer) -> Iterator[tuple[str | None, Any]]:
        """See `gymlink.gateway.call.Asked`."""
        turn, message = answer.turn, answer.message
        head = _head(answer, "chat.completion.chunk")
        with_usage = bool(self.stream_options and self.stream_options.include_usage)
        nothing_yet = {"usage": None} if with_usage else {}

        def chunk(delta: Mapping[str, Any], **more: Any) -> tuple[None, dict[str, Any]]:
            choice = {"index": 0, "delta": delta, "finish_reason": None, "logprobs": None, **more}
            return None, {**head, "choices": [choice], **nothing_yet}

        first = chunk({"role": "assistant", "content": ""})
        if self.return_token_ids:
            first[1]["prompt_token_ids"] = turn.prompt_ids
        yield first
        said = {name: text for name in ("reasoning_content", "reasoning", "content") if (text := message.get(name))}
        ids = {"token_ids": turn.completion_ids} if self.return_token_ids else {}
        yield chunk({**said, **self._ids(turn)}, logprobs=self._logprobs(turn), **ids)
        for index, call in enumerate(answer.calls):
            yield chunk({"tool_calls": [{"index": index, **call}]})
        yield chunk({}, finish_reason=_finish_reason(answer))
        if with_usage:
            yield None, {**head, "choices": [], "usage": _usage(turn)}
        yield None, "[DONE]"

    def _ids(self, turn: Turn) -> dict[str, Sequence[float]]:
        """Gym's three fields of a message."""
        if not self._wants_ids:
            return {}
        return dict(zip(ID_FIELDS, (turn.prompt_ids, turn.completion_ids, turn.logprobs), strict=True))

    def _logprobs(self, turn: Turn) -> dict[str, Any] | None:
        # Gym asks for logprobs with ids as text only because stock vLLM has no other way; the id fields replace it.
        if not self.logprobs or self.return_tokens_as_token_ids:
            return None
        return {
            "content": [
                {"token": f"token_id:{token}", "logprob": logprob, "bytes": None, "top_logprobs": []}
                for token, logprob in zip(turn.completion_ids, turn.logprobs, strict=True)
            ]
        }


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{answer.key}", "object": kind, "created": answer.created, "model": answer.model}


def _finish_reason(answer: Answer) -> str:
    return "tool_calls" if answer.calls and not answer.cut else answer.turn.finish_reason


def _usage(turn: Turn) -> dict[str, int]:
    prompt, completion = turn.prompt_tokens, len(turn.completion_ids)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _check_message(place: int, message: Message) -> None:
    """A field that would be lost is refused; null and absent are the same."""
    where = f"messages.{place}"
    text_field(message, "role", where)
    content = message.get("content")
    if not isinstance(content, str | None):
        for number, part in enumerate(objects(content, f"{where}.content")):
            if part.get("type") in ("text", None):
                text_field(part, "text", f"{where}.content.{number}", needed=False)
    for name in ("audio", "function_call", "refusal"):
        if message.get(name):
            raise invalid(f"{where}.{name} is not supported by this gateway.", f"{where}.{name}")
    text_field(message, "tool_call_id", where, needed=False)
    text_field(message, "name", where, needed=False)
    for number, call in enumerate(objects(message.get("tool_calls"), f"{where}.tool_calls")):
        _check_call(call, f"{where}.tool_calls.{number}")


def _check_call(call: Mapping[str, Any], where: str) -> None:
    text_field(call, "id", where, needed=False)
    function = call.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{where}.function: an object is needed.", f"{where}.function")
    text_field(function, "name", f"{where}.function")
    if not isinstance(function.get("arguments"), str | dict | None):
        raise invalid(f"{where}.function.arguments: JSON text is needed.", f"{where}.function.arguments")


def _checked_tools(tools: Any) -> Sequence[Tool]:
    checked = objects(tools, "tools")
    for index, tool in enumerate(checked):
        where = f"tools.{index}"
        if tool.get("type") != "function":
            raise invalid(f"{where}.type {tool.get('type')!r} is not supported: use 'function'.", f"{where}.type")
        if not isinstance(tool.get("function"), dict):
            raise invalid(f"{where}.function: an object is needed.", f"{where}.function")
        text_field(tool["function"], "name", f"{where}.function")
    return checked
