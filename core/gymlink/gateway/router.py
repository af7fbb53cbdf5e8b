"""Passes calls on: a call of the policy to the process that owns its rollout.

NeMo Gym knows one policy address. With several trainer processes, each has its own policy engine and must serve its
own rollouts; the owner is written in the rollout id ("<owner>.<unique>"), so routing needs no table of rollouts.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiohttp
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gymlink.gateway.http import policy_routes, read_body, until_hang_up
from gymlink.gateway.recognise import named_rollout, rollout_path
from gymlink.gateway.wire import WireError, decode

_KEPT = ("Content-Type", "Retry-After", "Cache-Control")
"""Headers of an answer that are passed back."""


def new_rollout_id(owner: int) -> str:
    """An id that no other rollout has, naming the process (rank) that owns it."""
    return f"{owner}.{uuid.uuid4().hex}"


Here = Callable[[Request, Mapping[str, Any], str | None], Awaitable[Response]]
"""Answers a call of the policy in this process: from the request, its body, and the rollout that it names."""


class Router:
    """Knows the gateways of the other processes of this job.

    Args:
        owner: this process (rank).
        peers: base URL ("http://host:port") by owner; this process need not be listed.
    """

    def __init__(self, owner: int = 0, peers: Mapping[int, str] | None = None) -> None:
        self.owner = owner
        self.peers: dict[str, str] = {str(rank): url for rank, url in (peers or {}).items() if rank != owner}
        self._session: aiohttp.ClientSession | None = None

    def peer_of(self, rollout_id: str) -> str | None:
        """The base URL of the process that owns the rollout; None when it is this one (or nobody's)."""
        return self.peers.get(rollout_id.partition(".")[0])

    def routes(self, path: str, here: Here, secret: str, method: str = "POST") -> list[Route]:
        """The routes of one kind of calls: answered `here`, or by the process that owns the rollout they name.

        What is passed on carries the run's secret, and the rollout's name in its path.
        """

        async def handler(request: Request) -> Response:
            content = await read_body(request)
            body = decode(content) if method == "POST" else {}
            rollout = named_rollout(request.scope, body)
            if rollout is not None and (peer := self.peer_of(rollout)) is not None:
                return await self.forward(peer + rollout_path(rollout, path), request, content, secret)
            answering = here(request, body, rollout)
            del content, body  # the engine may take long, and then they are no longer needed
            return await answering

        return policy_routes(path, handler, method)

    async def forward(self, url: str, request: Request, body: bytes, secret: str | None = None) -> Response:
        """The answer of the server at `url` to `request`, whose body was read. Who hangs up here hangs up there too.

        Raises:
            WireError: 424 when that server does not answer. (Gym's client repeats a 502, 503 or 504 without end.)
        """
        return await until_hang_up(request, self._send(request.method, url, body, secret))

    async def _send(self, method: str, url: str, body: bytes, secret: str | None) -> Response:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),  # Gym marks its sessions by cookie
                timeout=aiohttp.ClientTimeout(total=None),
            )
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {secret}"} if secret else {})
        # Not as bytes: aiohttp would write those in one piece, and warns of it.
        data = io.BytesIO(body) if body else None
        try:
            async with self._session.request(method, url, data=data, headers=headers) as answer:
                kept = {name: answer.headers[name] for name in _KEPT if name in answer.headers}
                return Response(await answer.read(), answer.status, kept)
        except aiohttp.ClientError as error:
            message = f"{url}, to which this call was passed on, did not answer: {error!r}."
            raise WireError(424, message, kind="peer_error") from error

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None
