"""The one address of a job whose workers are many: Gym calls the policy here, and the workers call Gym's agents here.

It holds no engine and no rollout: a call of the policy goes on to the worker that owns its rollout, and a row goes on
to the agent that it is for. So Gym's own servers, which ask for no password, can stay on loopback, and a worker needs
one address and one secret, on whatever node it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from gymlink.gateway.http import application, guarded, read_body
from gymlink.gateway.router import Router
from gymlink.gateway.wire import WireError, json_response, rollout_named_in


def create_front(secret: str, router: Router, agents: Mapping[str, str]) -> ASGIApp:
    """The ASGI application.

    Args:
        secret: what `Authorization: Bearer ...` must carry, here and at the workers.
        router: knows the workers; they may come and go while this serves.
        agents: base URL of each of Gym's agents, by name; may be filled while this serves.
    """

    async def policy(request: Request) -> Response:
        body = await read_body(request)
        rollout = rollout_named_in(body)
        if (worker := router.peer_of(rollout)) is None:
            message = f"No worker of this job owns the rollout {rollout!r}."
            raise WireError(404, message, kind="not_found_error", param="rollout")
        return await router.forward(worker + request.url.path, request, body, secret)

    async def run(request: Request) -> Response:
        name = request.path_params["agent"]
        if (agent := agents.get(name)) is None:
            known = ", ".join(sorted(agents)) or "none"
            raise WireError(404, f"No agent {name!r} runs; running: {known}.", kind="not_found_error")
        return await router.forward(f"{agent}/run", request, await read_body(request))

    async def health(_: Request) -> Response:
        return json_response({"status": "ok", "workers": len(router.peers), "agents": sorted(agents)})

    policy_paths = ("/v1/chat/completions", "/tokenize", "/v1/tokenize")
    return application(
        [
            Route("/health", health, methods=["GET"]),
            Route("/agents/{agent:path}/run", guarded(run), methods=["POST"]),
            *(Route(path, guarded(policy), methods=["POST"]) for path in policy_paths),
        ],
        secret,
    )


def agent_url(front: str, agent: str) -> str:
    """The base URL at which the front at `front` takes rows for an agent."""
    return f"{front}/agents/{quote(agent, safe='')}"
