"""What gymlink is compared with, as programs of an environment of their own: it needs nothing of ours.

    python peer_servers.py scripted ANSWER.json    answers every chat completion with what is in the file
    python peer_servers.py proxy URL               passes bytes on, and does nothing else

Each prints its port.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PATHS = ("/chat/completions", "/v1/chat/completions")


def scripted(answer: str) -> Starlette:
    """The scripted answer itself. Each call of a tool has an id of its own, in the place of `CALL_ID`."""
    text, numbers = Path(answer).read_text(encoding="utf-8"), count()

    async def complete(request: Request) -> Response:
        json.loads(await request.body())
        return Response(text.replace("CALL_ID", f"call{next(numbers):09}"), media_type="application/json")

    return Starlette(routes=[Route(path, complete, methods=["POST"]) for path in PATHS])


def proxy(url: str) -> Starlette:
    """The plainest proxy that people write: bytes in, bytes out, over kept connections."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    client = httpx.AsyncClient(base_url=url, limits=limits, timeout=None)

    async def pass_on(request: Request) -> Response:
        body = await request.body()
        answer = await client.post(request.url.path, content=body, headers={"Content-Type": "application/json"})
        return Response(answer.content, answer.status_code, media_type="application/json")

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await client.aclose()

    return Starlette(routes=[Route(path, pass_on, methods=["POST"]) for path in PATHS], lifespan=lifespan)


def main() -> None:
    kind, argument = sys.argv[1:]
    app = {"scripted": scripted, "proxy": proxy}[kind](argument)
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, loop="asyncio", timeout_keep_alive=60)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
