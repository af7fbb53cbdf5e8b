"""The gateway over HTTP: OpenAI-compatible chat completions, models, tokenize and health.

Every call but `/health` needs the run's secret as a bearer token. A failure is always an OpenAI-shaped error and
never a traceback. A rollout that another process of the same job owns is passed on to it (see `Router`).
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from gymlink.gateway.http import application, guarded, read_body
from gymlink.gateway.router import Router
from gymlink.gateway.service import PolicyService
from gymlink.gateway.wire import json_response, parse_chat_request, parse_tokenize_request


def create_app(service: PolicyService, secret: str, router: Router | None = None) -> ASGIApp:
    """The ASGI application. `secret` is what `Authorization: Bearer ...` must carry."""
    router = router or Router()

    async def chat_completions(request: Request) -> Response:
        body = await read_body(request)
        chat = parse_chat_request(body)
        if (peer := router.peer_of(chat.rollout)) is not None:
            return await router.forward(peer + request.url.path, request, body, secret)

        async def connected() -> bool:
            return not await request.is_disconnected()

        return json_response(await service.chat(chat, connected))

    async def tokenize(request: Request) -> Response:
        body = await read_body(request)
        asked = parse_tokenize_request(body)
        if (peer := router.peer_of(asked.rollout)) is not None:
            return await router.forward(peer + request.url.path, request, body, secret)
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
        Route("/v1/chat/completions", guarded(chat_completions), methods=["POST"]),
        Route("/tokenize", guarded(tokenize), methods=["POST"]),
        Route("/v1/tokenize", guarded(tokenize), methods=["POST"]),
    ]
    return application(routes, secret)
