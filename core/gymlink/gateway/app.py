"""The gateway over HTTP: OpenAI-compatible chat completions, models, tokenize and health.

Every call but `/health` needs the run's secret as a bearer token. A failure is always an OpenAI-shaped error and
never a traceback. A rollout that another process of the same job owns is passed on to it (see `Router`).
"""

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

from gymlink.gateway.router import Router
from gymlink.gateway.service import PolicyService
from gymlink.gateway.wire import (
    WireError,
    error_response,
    json_response,
    parse_chat_request,
    parse_tokenize_request,
)

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 256 * 1024 * 1024
"""A request of 128k tokens over 50 turns with ids on every message is about 24 MB."""

CLIENT_CLOSED_REQUEST = 499

Handler = Callable[[Request], Awaitable[Response]]


def create_app(service: PolicyService, secret: str, router: Router | None = None) -> ASGIApp:
    """The ASGI application. `secret` is what `Authorization: Bearer ...` must carry."""
    router = router or Router()

    async def chat_completions(request: Request) -> Response:
        body = await _body(request)
        chat = parse_chat_request(body)
        if (peer := router.peer_of(chat.rollout)) is not None:
            return await router.forward(peer, request, body, secret)

        async def connected() -> bool:
            return not await request.is_disconnected()

        return json_response(await service.chat(chat, connected))

    async def tokenize(request: Request) -> Response:
        body = await _body(request)
        asked = parse_tokenize_request(body)
        if (peer := router.peer_of(asked.rollout)) is not None:
            return await router.forward(peer, request, body, secret)
        token_ids = service.tokenize(asked)
        answer = {"count": len(token_ids), "max_model_len": service.engine.max_context, "tokens": token_ids}
        return json_response(answer)

    async def models(_: Request) -> Response:
        card = {"id": service.model, "object": "model", "owned_by": "gymlink", "created": 0}
        return json_response({"object": "list", "data": [{**card, "max_model_len": service.engine.max_context}]})

    async def health(_: Request) -> Response:
        return json_response({"status": "ok", "open_rollouts": len(service.rollouts)})

    routes = [
        Route("/health", health, methods=["GET"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/chat/completions", _guarded(chat_completions), methods=["POST"]),
        Route("/tokenize", _guarded(tokenize), methods=["POST"]),
        Route("/v1/tokenize", _guarded(tokenize), methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})
    return _NeedsSecret(app, secret)


async def _body(request: Request) -> bytes:
    declared = int(request.headers.get("content-length") or 0)
    if declared > MAX_BODY_BYTES:
        message = f"The request body has {declared} bytes; at most {MAX_BODY_BYTES} are read."
        raise WireError(413, message, kind="invalid_request_error")
    return await request.body()


def _guarded(handler: Handler) -> Handler:
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


async def _http_error(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else str(error)
    return error_response(status, f"{detail}. This gateway answers /v1/chat/completions.", kind="not_found_error")


class _NeedsSecret:
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
