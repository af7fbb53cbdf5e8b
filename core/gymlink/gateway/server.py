"""Runs the gateway's application on an event loop that exists already; its address is known before it serves."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from gymlink.config import GatewaySettings
from gymlink.errors import ConfigError

KEEP_ALIVE_S = 30
"""Longer than clients keep an idle connection (Gym's and ours: 15 s), so none is closed as a call is sent on it."""


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signal handlers to the program that the gateway is a guest in."""
        yield


class GatewayServer:
    """An HTTP server for one ASGI application.

    The port is taken when the object is made, so that `url` can be told to Gym before anything runs.

    Raises:
        ConfigError: the address cannot be had.
    """

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._socket = _bind(settings.host, settings.port)
        port = self._socket.getsockname()[1]
        host = settings.advertise_host or _reachable(settings.host)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        """Where Gym's servers reach this gateway, without `/v1`."""
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=4096,
        )
        self._server = _Uvicorn(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve on the running loop, until `stop`."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._serving.done():
                await self._serving
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Stop serving; requests in flight are cut off. Calling it twice is fine."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
            self._serving = None
        self._socket.close()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY on what it accepts. Without, the body of each answer waits for
    # the client to acknowledge its head, which clients put off for 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"gateway.port {port} on {host} is in use by another program. Choose another, or 0 for a free one."
            ) from error
        raise ConfigError(f"gateway.host {host!r} port {port} cannot be used: {error.strerror or error}.") from error
    return sock


def _reachable(host: str) -> str:
    """An address for clients when the server listens on every interface."""
    if host in {"0.0.0.0", "::"}:  # noqa: S104 - compared, not bound
        return socket.gethostbyname(socket.gethostname())
    return host
