"""The OpenAI wire format: what a request may ask, and how answers and errors look.

Every field of a request is in one of three places: honoured, pinned by the trainer, or harmless. Any other is
refused by name, because a field that is ignored silently changes what is trained.
Source of the shapes: the OpenAI chat-completions reference, and vLLM's additions as NeMo Gym uses them
(responses_api_models/vllm_model/app.py).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

from gymlink.align import Parsed
from gymlink.types import Message, Turn

ROLLOUT_FIELD = "gymlink_rollout"
"""Body field that names the rollout; Gym copies it there from a row's `metadata.extra_body`."""

ID_FIELDS = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")
"""What Gym asks for on a message, and sends back on the next turn."""

PINNED = frozenset({"temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty"})
"""How to sample is the trainer's to say: an agent's own values would bias the importance ratios."""

HARMLESS = frozenset(
    {"metadata", "parallel_tool_calls", "store", "user", "service_tier", "top_logprobs", "stream_options"}
    | {"add_generation_prompt", "return_token_ids", "reasoning_effort", "prompt_cache_key", "safety_identifier"}
)
"""Without effect on what is sampled here."""


Model = TypeVar("Model", bound=BaseModel)


class WireError(Exception):
    """A request that cannot be answered, as the OpenAI error it becomes."""

    def __init__(self, status: int, message: str, *, kind: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    rollout: str | None = Field(None, alias="gymlink_rollout")
    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False

    @property
    def template_args(self) -> Mapping[str, Any]:
        """What the chat template is called with, beside messages and tools."""
        extra = {"continue_final_message": True} if self.continue_final_message else {}
        return {**(self.chat_template_kwargs or {}), **extra}


class TokenizeRequest(_Request):
    """vLLM's `/tokenize`, for messages."""


class ChatRequest(_Request):
    """A chat completion, as far as this gateway honours it."""

    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    return_tokens_as_token_ids: bool = False
    tool_choice: Any = None
    n: Literal[1] | None = None
    stream: Literal[False] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def usable_tools(self) -> list[dict[str, Any]]:
        """The tools to show to the policy: none when the request forbids calling any."""
        return [] if self.tool_choice == "none" else self.tools or []


def parse_chat_request(body: bytes) -> ChatRequest:
    """Raises `WireError` 400 naming what is wrong, or which field is not supported."""
    request = _parse(ChatRequest, body)
    unknown = [
        name
        for name, value in (request.model_extra or {}).items()
        if value not in (None, [], {}) and name not in PINNED and name not in HARMLESS
    ]
    if unknown:
        raise WireError(
            400,
            f"The request field {unknown[0]!r} is not supported by this gateway; leave it out.",
            kind="invalid_request_error",
            param=unknown[0],
        )
    if request.tool_choice not in (None, "auto", "none"):
        raise WireError(
            400,
            f"tool_choice {request.tool_choice!r} is not supported: use 'auto' or 'none'. Forcing a call would sample "
            "from another distribution than the one that is trained.",
            kind="invalid_request_error",
            param="tool_choice",
        )
    return request


def parse_tokenize_request(body: bytes) -> TokenizeRequest:
    """Raises `WireError` 400."""
    return _parse(TokenizeRequest, body)


def rollout_named_in(body: bytes) -> str | None:
    """The rollout that a request of the policy names; nothing else of it is judged. Raises `WireError` 400."""
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise WireError(400, f"The request body is not JSON: {error}.", kind="invalid_request_error") from error
    name = request.get(ROLLOUT_FIELD) if isinstance(request, dict) else None
    return name if isinstance(name, str) else None


def _parse(model: type[Model], body: bytes) -> Model:
    try:
        return model.model_validate(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise WireError(400, f"The request body is not JSON: {error}.", kind="invalid_request_error") from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or None
        raise WireError(
            400, f"{where or 'The request'}: {problem['msg']}.", kind="invalid_request_error", param=where
        ) from error


def assistant_message(parsed: Parsed, turn_key: str) -> dict[str, Any]:
    """The OpenAI message for a sampled completion, without token ids. `turn_key` makes its tool-call ids unique."""
    message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
    if parsed.reasoning:
        # vLLM renamed the field in 0.16; Gym 0.4 reads either.
        message["reasoning_content"] = message["reasoning"] = parsed.reasoning
    if parsed.tool_calls:
        message["content"] = parsed.content or None
        message["tool_calls"] = [
            {
                "id": call.id or f"call_{turn_key}_{index}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for index, call in enumerate(parsed.tool_calls)
        ]
    return message


def chat_completion(request: ChatRequest, turn: Turn, message: Message, *, model: str) -> dict[str, Any]:
    """The body of a chat completion. The message carries Gym's three id fields."""
    finish_reason = "tool_calls" if message.get("tool_calls") and turn.finish_reason == "stop" else turn.finish_reason
    prompt_tokens, completion_tokens = len(turn.prompt_ids), len(turn.completion_ids)
    choice: dict[str, Any] = {
        "index": 0,
        "message": {**message, **dict(zip(ID_FIELDS, _ids(turn), strict=True))},
        "finish_reason": finish_reason,
        "logprobs": None,
    }
    # Gym asks for logprobs with ids as text only because stock vLLM has no other way; the id fields replace it.
    if request.logprobs and not request.return_tokens_as_token_ids:
        choice["logprobs"] = {"content": _logprobs_content(turn)}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model or model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _ids(turn: Turn) -> tuple[Sequence[int], Sequence[int], Sequence[float]]:
    return turn.prompt_ids, turn.completion_ids, turn.logprobs


def _logprobs_content(turn: Turn) -> list[dict[str, Any]]:
    return [
        {"token": f"token_id:{token}", "logprob": logprob, "bytes": None, "top_logprobs": []}
        for token, logprob in zip(turn.completion_ids, turn.logprobs, strict=True)
    ]


def json_response(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def error_response(status: int, message: str, *, kind: str, param: str | None = None) -> Response:
    """An error in OpenAI's shape."""
    error = {"message": message, "type": kind, "param": param, "code": status}
    return json_response({"error": error}, status)
