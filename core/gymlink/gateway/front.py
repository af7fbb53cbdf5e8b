"""The one address of a job whose workers are many: Gym calls the policy here, and the workers call Gym's agents here.

It holds no engine and no rollout: a call of the policy goes on to the worker that owns its rollout, and a row goes on
to the agent that it is for. So Gym's own servers, which ask for no password, can stay on loopback, and a worker needs
one address and one secret, on whatever node it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from gymlink.gateway.app import MODELS, POLICY_PATHS
from gymlink.gateway.http import application, guarded, read_body
from gymlink.gateway.router import Router
from gymlink.gateway.wire import WireError, json_response


def create_front(secret: str, router: Router, agents: Mapping[str, str]) -> ASGIApp:
    """The ASGI application.

    Args:
        secret: what opens everything, here and at the workers.
        router: knows the workers; they may come and go while this serves.
        agents: base URL of each of Gym's agents, by name; may be filled while this serves.
    """

    async def nobodys(_request: Request, _body: Mapping[str, Any], rollout: str | None) -> Response:
        message = f"No worker of this job owns the rollout {rollout!r}."
        if rollout is None:
            message += " An agent that builds its own requests has to pass on responses_create_params.metadata."
        raise WireError(404, message, kind="not_found_error", param="rollout")

    async def run(request: Request) -> Response:
        name = request.path_params["agent"]
        if (agent := agents.get(name)) is None:
            known = ", ".join(sorted(agents)) or "none"
            raise WireError(404, f"No agent {name!r} runs; running: {known}.", kind="not_found_error")
        return await router.forward(f"{agent}/run", request, await read_body(request))

    async def health(_: Request) -> Response:
        return json_response({"status": "ok", "workers": len(router.peers), "agents": sorted(agents)})

    policy = [route for path in POLICY_PATHS for route in router.routes(path, nobodys, secret)]
    others = [
        Route("/health", health, methods=["GET"]),
        Route("/agents/{agent:path}/run", guarded(run), methods=["POST"]),
    ]
    return application([*policy, *router.routes(MODELS, nobodys, secret, "GET")], secret, others)


def agent_url(front: str, agent: str) -> str:
    """The base URL at which the front at `front` takes rows for an agent."""
    return f"{front}/agents/{quote(agent, safe='')}"
