"""The gateway over HTTP: chat completions, Responses, Anthropic's Messages, models, tokenize and health.

Every call but `/health` needs the run's secret, or the key of the rollout that it is for. A failure is always an
OpenAI-shaped error and never a traceback. A rollout that another process of the same job owns is passed on to it (see
`Router`). An answer is complete before the first event of a stream is sent, so an error always has its own status.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from gymlink.gateway.anthropic import MessagesRequest
from gymlink.gateway.call import Asked
from gymlink.gateway.chat import ChatRequest, TokenizeRequest
from gymlink.gateway.http import application, has_hung_up
from gymlink.gateway.responses import ResponsesRequest
from gymlink.gateway.router import Here, Router
from gymlink.gateway.service import PolicyService
from gymlink.gateway.wire import event_stream, json_response

DIALECTS: Mapping[str, Callable[[Mapping[str, Any]], Asked]] = {
    "/v1/chat/completions": ChatRequest.read,
    "/v1/responses": ResponsesRequest.read,
    "/v1/messages": MessagesRequest.read,
}
"""How a call of the policy is read, by its path."""

MODELS = "/v1/models"
TOKENIZE = ("/tokenize", "/v1/tokenize")
COUNT = "/v1/messages/count_tokens"
POLICY_PATHS = (*DIALECTS, *TOKENIZE, COUNT)
"""Where a policy's calls are posted."""

Body = Mapping[str, Any]


def create_app(
    service: PolicyService, secret: str, router: Router | None = None, extra_routes: Sequence[Route] = ()
) -> ASGIApp:
    """The ASGI application.

    Args:
        service: answers.
        secret: what opens everything, as `Authorization: Bearer ...` or `x-api-key: ...`.
        router: knows the other processes of the job, if there are some.
        extra_routes: further routes, which only the secret opens.
    """
    router, here = router or Router(), _Here(service)
    answers: dict[str, Here] = {path: here.speaks(read) for path, read in DIALECTS.items()}
    answers |= dict.fromkeys(TOKENIZE, here.tokenize)
    answers[COUNT] = here.count_tokens
    policy = [route for path, answer in answers.items() for route in router.routes(path, answer, secret)]
    policy += router.routes(MODELS, here.models, secret, "GET")
    return application(policy, secret, [Route("/health", here.health, methods=["GET"]), *extra_routes])


class _Here:
    """Answers calls with a service of this process."""

    def __init__(self, service: PolicyService) -> None:
        self._service = service

    def speaks(self, read: Callable[[Body], Asked]) -> Here:
        """Answers in the dialect whose requests are read so."""

        async def answer(request: Request, body: Body, rollout: str | None) -> Response:
            async def connected() -> bool:
                return not await has_hung_up(request)

            asked = read(body)
            answering = self._service.ask(asked.call(self._service.threads(rollout)), rollout, connected)
            asked = asked.without_conversation()
            del body  # as in the router: nothing of a request's size waits for the engine
            answered = await answering
            return event_stream(asked.events(answered)) if asked.stream else json_response(asked.body(answered))

        return answer

    async def tokenize(self, _: Request, body: Body, rollout: str | None) -> Response:
        token_ids = await self._service.prompt_ids(TokenizeRequest.read(body).call(), rollout)
        max_context = self._service.engine.max_context
        return json_response({"count": len(token_ids), "max_model_len": max_context, "tokens": token_ids})

    async def count_tokens(self, _: Request, body: Body, rollout: str | None) -> Response:
        call = MessagesRequest.read(body).call(self._service.threads(rollout))
        return json_response({"input_tokens": len(await self._service.prompt_ids(call, rollout))})

    async def models(self, _: Request, _body: Body, _rollout: str | None) -> Response:
        name = self._service.model
        ends = {"first_id": name, "last_id": name, "has_more": False}
        return json_response({"object": "list", "data": [_card(self._service)], **ends})

    async def health(self, _: Request) -> Response:
        service = self._service
        return json_response({"status": "ok", "open_rollouts": len(service.rollouts), "paused": service.paused})


def _card(service: PolicyService) -> dict[str, Any]:
    """The policy in a list of models, as OpenAI, vLLM and Anthropic write it."""
    return {
        "id": service.model,
        "object": "model",
        "owned_by": "gymlink",
        "created": 0,
        "max_model_len": service.engine.max_context,
        "type": "model",
        "display_name": service.model,
        "created_at": "1970-01-01T00:00:00Z",
    }
