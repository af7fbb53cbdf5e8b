"""What the gateway's HTTP applications share: who may call what, bounded bodies, errors that are never tracebacks.

The run's secret opens everything. A rollout's key opens an application in which nothing but calls of the policy exists,
so a route of another kind cannot be reached with it by mistake.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gymlink.gateway.recognise import Secret
from gymlink.gateway.wire import INVALID, WireError, error_response, hung_up

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 256 * 1024 * 1024
"""A request of 128k tokens over 50 turns with ids on every message is about 24 MB."""

Handler = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


def application(policy: Sequence[Route], secret: str, others: Sequence[Route] = ()) -> ASGIApp:
    """An ASGI application in which every call but `/health` must carry a key.

    Args:
        policy: the routes of the policy's calls, which a rollout's key opens too.
        secret: the run's, which opens all.
        others: what only the secret opens.
    """
    handlers = {HTTPException: _http_error}
    everything = Starlette(routes=[*policy, *others], exception_handlers=handlers)
    return _Door(Secret(secret), everything, Starlette(routes=[*policy], exception_handlers=handlers))


def policy_routes(path: str, handler: Handler, method: str = "POST") -> list[Route]:
    """The route of a call of the policy: at `path`, and at the same path of each rollout."""
    guarded_handler = guarded(handler)
    return [Route(where, guarded_handler, methods=[method]) for where in (path, "/rollout/{rollout}" + path)]


async def read_body(request: Request) -> bytes:
    """Raises `WireError` 413 for more than `MAX_BODY_BYTES`."""
    _refuse_beyond_limit(int(request.headers.get("content-length") or 0))
    chunks, size = [], 0
    async for chunk in request.stream():  # a body may come without a length
        chunks.append(chunk)
        size += len(chunk)
        _refuse_beyond_limit(size)
    return b"".join(chunks)


def _refuse_beyond_limit(size: int) -> None:
    if size > MAX_BODY_BYTES:
        message = f"The request body has {size} bytes or more; at most {MAX_BODY_BYTES} are read."
        raise WireError(413, message, kind=INVALID)


async def until_hang_up(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives, unless the client of `request`, whose body was read, hangs up: that cancels it.

    Raises:
        WireError: 499 when the client hung up.
    """
    working = asyncio.ensure_future(work)
    hang_up = asyncio.ensure_future(request.receive())  # after the body, the only message left is http.disconnect
    try:
        await asyncio.wait({working, hang_up}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise hung_up()
    finally:
        working.cancel()
        hang_up.cancel()


async def has_hung_up(request: Request) -> bool:
    """Whether the client of `request`, whose body was read, has hung up by now.

    Starlette's own `is_disconnected` asks the same with a cancel scope around it, at twice the cost of all dispatch.
    """
    asking = asyncio.ensure_future(request.receive())  # after the body, the only message left is http.disconnect
    try:
        for _ in range(3):  # for the loop to see what came from the network, to take it in, and to tell this task
            await asyncio.sleep(0)
        return asking.done() and asking.result()["type"] == "http.disconnect"
    finally:
        asking.cancel()


def guarded(handler: Handler) -> Handler:
    """Whatever goes wrong in `handler` becomes an OpenAI-shaped error."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except WireError as error:
            failure = error
        except ClientDisconnect:
            failure = hung_up()
        except Exception as error:
            logger.exception("gateway: unexpected failure on %s", request.scope["path"])
            message = f"The gateway failed: {type(error).__name__}: {error}. Its log has the details."
            failure = WireError(500, message, kind="internal_error")
        return error_response(failure, request.scope["path"])

    return answer


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else str(error)
    message = (
        f"{detail}: {request.method} {request.scope['path']}. Calls of the policy are POST /v1/chat/completions, "
        "/v1/responses or /v1/messages, also below /rollout/<id>."
    )
    return error_response(WireError(status, message, kind="not_found_error"), request.scope["path"])


class _Door:
    """Middleware, as plain ASGI so that it costs nothing per token."""

    def __init__(self, secret: Secret, everything: ASGIApp, policy: ASGIApp) -> None:
        self._secret, self._everything, self._policy = secret, everything, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health" or self._secret.admits(scope):
            await self._everything(scope, receive, send)
        elif self._secret.admits_rollout(scope):
            await self._policy(scope, receive, send)
        else:
            message = (
                "The key is missing or wrong: send the run's secret, or a rollout's key, as 'Authorization: Bearer "
                "<policy_api_key>' or as 'x-api-key'."
            )
            refusal = WireError(401, message, kind="authentication_error")
            await error_response(refusal, scope["path"])(scope, receive, send)
