"""Passes calls on: a call of the policy to the process that owns its rollout.

NeMo Gym knows one policy address. With several trainer processes, each has its own policy engine and must serve its
own rollouts; the owner is written in the rollout id ("<owner>.<unique>"), so routing needs no table of rollouts.
"""

from __future__ import annotations

import asyncio
import io
import uuid
from collections.abc import Mapping

import aiohttp
from starlette.requests import Request
from starlette.responses import Response

from gymlink.gateway.wire import WireError


def new_rollout_id(owner: int) -> str:
    """An id that no other rollout has, naming the process (rank) that owns it."""
    return f"{owner}.{uuid.uuid4().hex}"


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

    def peer_of(self, rollout_id: str | None) -> str | None:
        """The base URL of the process that owns the rollout; None when it is this one (or nobody's)."""
        if rollout_id is None or not self.peers:
            return None
        return self.peers.get(rollout_id.partition(".")[0])

    async def forward(self, url: str, request: Request, body: bytes, secret: str | None = None) -> Response:
        """The answer of the server at `url` to `request`, whose body was read. Who hangs up here hangs up there too.

        Raises:
            WireError: 424 when that server does not answer. (Gym's client repeats a 502, 503 or 504 without end.)
        """
        posting = asyncio.create_task(self._post(url, body, secret))
        hang_up = asyncio.ensure_future(request.receive())  # after the body, the only message left is http.disconnect
        try:
            await asyncio.wait({posting, hang_up}, return_when=asyncio.FIRST_COMPLETED)
            if posting.done():
                return posting.result()
            raise WireError(499, "The client closed the connection before the answer was ready.", kind="disconnected")
        finally:
            posting.cancel()
            hang_up.cancel()

    async def _post(self, url: str, body: bytes, secret: str | None) -> Response:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),  # Gym marks its sessions by cookie
                timeout=aiohttp.ClientTimeout(total=None),
            )
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {secret}"} if secret else {})
        try:
            # Not as bytes: aiohttp would write those in one piece, and warns of it.
            async with self._session.post(url, data=io.BytesIO(body), headers=headers) as answer:
                return Response(await answer.read(), answer.status, media_type="application/json")
        except aiohttp.ClientError as error:
            message = f"{url}, to which this call was passed on, did not answer: {error!r}."
            raise WireError(424, message, kind="peer_error") from error

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None
