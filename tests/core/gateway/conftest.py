"""A gateway over real HTTP with the scripted engine, and a client that speaks to it as Gym's model server does."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from gymlink.config import GatewaySettings
from gymlink.engines import ScriptedEngine
from gymlink.gateway import GatewayServer, PolicyService, Router, create_app
from gymlink.types import Sampling

SECRET = "s3cret"


class Client:
    """Speaks to one gateway."""

    def __init__(self, http: aiohttp.ClientSession, server: GatewayServer, service: PolicyService) -> None:
        self.http, self.server, self.service = http, server, service
        self.secret = SECRET

    async def send(self, path: str, body: Any, headers: dict[str, str], method: str = "POST") -> tuple[int, Any, Any]:
        """Status, JSON and headers of the answer."""
        data = {"data": body} if isinstance(body, bytes) else {"json": body}
        async with self.http.request(method, self.server.url + path, headers=headers, **data) as answer:
            return answer.status, await answer.json(content_type=None), answer.headers

    async def post(self, path: str, body: Any, secret: str = SECRET) -> tuple[int, Any]:
        status, content, _ = await self.send(path, body, {"Authorization": f"Bearer {secret}"})
        return status, content

    async def chat(self, messages: list[Any], rollout: str | None = None, **more: Any) -> tuple[int, Any]:
        """A chat completion as Gym asks for one: with token ids."""
        named = {"gymlink_rollout": rollout} if rollout else {}
        asked = {"messages": messages, "return_tokens_as_token_ids": True}
        return await self.post("/v1/chat/completions", {**asked, **named, **more})


@pytest.fixture
async def gateway(chat_format) -> AsyncIterator[Any]:
    """`await gateway(script, ...)` is a client of one more gateway. The script defaults to two ids and a stop token."""
    running: list[GatewayServer] = []
    stop = chat_format.stop_token_ids[0]

    async with aiohttp.ClientSession() as http:

        async def make(
            script: Any = None,
            router: Router | None = None,
            max_tokens: int = 8,
            hold_s: float = 30.0,
            routes: Any = (),
            **options: Any,
        ) -> Client:
            engine = ScriptedEngine(script or (lambda prompt: (72, 105, stop)), **options)
            service = PolicyService(chat_format, engine, Sampling(max_tokens=max_tokens), hold_s=hold_s)
            server = GatewayServer(create_app(service, SECRET, router, routes), GatewaySettings())
            running.append(server)
            await server.start()
            return Client(http, server, service)

        try:
            yield make
        finally:
            for server in running:
                await server.stop()
