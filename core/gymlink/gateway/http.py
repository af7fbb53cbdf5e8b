"""What the gateway's HTTP applications share: the run's secret, bounded bodies, errors that are never tracebacks."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gymlink.gateway.wire import WireError, error_response

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 256 * 1024 * 1024
"""A request of 128k tokens over 50 turns with ids on every message is about 24 MB."""

CLIENT_CLOSED_REQUEST = 499

Handler = Callable[[Request], Awaitable[Response]]


def application(routes: list[Route], secret: str) -> ASGIApp:
    """An ASGI application for these routes, in which every call but `/health` must carry the secret."""
    return NeedsSecret(Starlette(routes=routes, exception_handlers={HTTPException: http_error}), secret)


async def read_body(request: Request) -> bytes:
    """Raises `WireError` 413 for more than `MAX_BODY_BYTES`."""
    _refuse_beyond_limit(int(request.headers.get("content-length") or 0))
    body = bytearray()
    async for chunk in request.stream():  # a body may come without a length
        body += chunk
        _refuse_beyond_limit(len(body))
    return bytes(body)


def _refuse_beyond_limit(size: int) -> None:
    if size > MAX_BODY_BYTES:
        message = f"The request body has {size} bytes or more; at most {MAX_BODY_BYTES} are read."
        raise WireError(413, message, kind="invalid_request_error")


def guarded(handler: Handler) -> Handler:
    """Whatever goes wrong in `handler` becomes an OpenAI-shaped error."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except WireError as error:
            return error_response(error.status, str(error), kind=error.kind, param=error.param)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except Exception as error:
            logger.exception("gateway: unexpected failure on %s", request.url.path)
            message = f"The gateway failed: {type(error).__name__}: {error}. Its log has the details."
            return error_response(500, message, kind="internal_error")

    return answer


async def http_error(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else str(error)
    return error_response(status, f"{detail}. This gateway answers /v1/chat/completions.", kind="not_found_error")


class NeedsSecret:
    """Middleware, as plain ASGI so that it costs nothing per token."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app = app
        self._expected = f"Bearer {secret}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health" and not self._carries_secret(scope):
            message = "The run's secret is missing or wrong: send it as 'Authorization: Bearer <policy_api_key>'."
            await error_response(401, message, kind="authentication_error")(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _carries_secret(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._expected)
