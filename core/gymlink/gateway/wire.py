"""What every dialect of the gateway shares on the wire: bodies read, fields refused by name, errors, events.

Every field of a request is in one of three places: honoured, pinned by the trainer, or harmless. Any other is
refused by name, because a field that is ignored silently changes what is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar, Self, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.responses import Response

from gymlink.packed import to_json

ROLLOUT_FIELD = "gymlink_rollout"
"""Body field that names the rollout; Gym copies it there from a row's `metadata.extra_body`."""

PINNED = frozenset({"temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty"})
"""How to sample is the trainer's to say: an agent's own values would bias the importance ratios."""

INVALID = "invalid_request_error"
OVERFLOW = "context_length_exceeded"

Model = TypeVar("Model", bound=BaseModel)


class WireError(Exception):
    """A request that cannot be answered, as the OpenAI error it becomes."""

    def __init__(
        self, status: int, message: str, *, kind: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.retry_after_s = retry_after_s


def invalid(message: str, param: str | None = None) -> WireError:
    """The error for a request that is wrong in itself."""
    return WireError(400, message, kind=INVALID, param=param)


def hung_up() -> WireError:
    """The error for a client that no longer listens."""
    return WireError(499, "The client closed the connection before the answer was ready.", kind="disconnected")


class Request(BaseModel):
    """The base of every dialect's requests: a declared field is honoured, and refuses values that cannot be.

    What grows with the conversation is declared as `Any` and checked where it is read, once and without a copy.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    harmless: ClassVar[frozenset[str]] = frozenset()
    """Fields without effect on what is sampled here."""

    conversation: ClassVar[str] = "messages"
    """The field that holds it."""

    def without_conversation(self) -> Self:
        """See `gymlink.gateway.call.Asked`."""
        return self.model_copy(update={self.conversation: None})

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Self:
        """Raises `WireError` 400 naming what is wrong, or which field is not supported."""
        request = checked(cls, body)
        refuse_others(request.model_extra or {}, PINNED | cls.harmless | {ROLLOUT_FIELD})
        return request


def refuse_others(item: Mapping[str, Any], known: AbstractSet[str], where: str = "") -> None:
    """Raises `WireError` 400 for a field that is not known and has a value; `where` ends with a dot, or is empty."""
    for name, value in item.items():
        if name not in known and value not in (None, [], {}):
            raise invalid(
                f"The request field {where + name!r} is not supported by this gateway; leave it out.", where + name
            )


def decode(body: bytes | bytearray) -> dict[str, Any]:
    """The JSON object that a request's body holds. Raises `WireError` 400."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"The request body is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise invalid(f"The request body is {type(value).__name__}; a JSON object is needed.")
    return value


def checked(model: type[Model], value: Mapping[str, Any]) -> Model:
    """Raises `WireError` 400 naming the first thing that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or None
        raise invalid(f"{where or 'The request'}: {problem['msg']}.", where) from error


def parse_body(model: type[Model], body: bytes | bytearray) -> Model:
    """A body as `model`. Raises `WireError` 400."""
    return checked(model, decode(body))


def objects(value: Any, where: str) -> Sequence[dict[str, Any]]:
    """`value` as a list of JSON objects; none for null. Raises `WireError` 400 naming the place."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise invalid(f"{where}: a list is needed, not {type(value).__name__}.", where)
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise invalid(f"{where}.{index}: an object is needed, not {type(item).__name__}.", f"{where}.{index}")
    return value


def text_field(item: Mapping[str, Any], name: str, where: str, *, needed: bool = True) -> str:
    """A text of an object; empty when it is missing and not needed. Raises `WireError` 400 naming the place."""
    value = item.get(name)
    if value is None and not needed:
        return ""
    if not isinstance(value, str) or (needed and not value):
        raise invalid(f"{where}.{name}: a text is needed.", f"{where}.{name}")
    return value


def dumped(value: Any, where: str) -> str:
    """`value`, which came in a body, as JSON text. Raises `WireError` 400 for more levels than can be written."""
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:
        raise invalid(f"{where} is nested too deeply.", where) from error


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content` as JSON."""
    return Response(to_json(content), status, headers, media_type="application/json")


def event_stream(events: Iterable[tuple[str | None, Any]]) -> Response:
    """Server-sent events, each with a name or none, and its data. They are all there already, so they go as one body.

    A string is sent as it is (OpenAI's `[DONE]`).
    """
    body = b"".join(
        (b"event: %s\n" % name.encode() if name else b"")
        + b"data: %s\n\n" % (data.encode() if isinstance(data, str) else to_json(data))
        for name, data in events
    )
    return Response(body, headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")


_ANTHROPIC_KINDS = {
    400: INVALID,
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


def error_response(error: WireError, path: str = "") -> Response:
    """An error in OpenAI's shape; for Anthropic's paths, in one that both read."""
    told: dict[str, Any] = {"message": str(error), "type": error.kind, "param": error.param, "code": error.status}
    body: dict[str, Any] = {"error": told}
    if "/v1/messages" in path:
        told["type"] = _ANTHROPIC_KINDS.get(error.status, "api_error")
        if error.kind == OVERFLOW:
            told["message"] = f"prompt is too long: {error}"  # the words by which agents know that they must compact
        body["type"] = "error"
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return json_response(body, error.status, headers)
