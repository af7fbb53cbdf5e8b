"""The server that the gateway, the front of a job and `gymlink serve` all run on."""

import socket
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest
from starlette.types import ASGIApp

from gymlink.config import GatewaySettings
from gymlink.engines import ScriptedEngine
from gymlink.gateway import GatewayServer, PolicyService, Router, create_app, create_front
from gymlink.types import Sampling

SECRET = "s3cret"


def a_gateway(chat_format) -> ASGIApp:
    return create_app(PolicyService(chat_format, ScriptedEngine(lambda _: ()), Sampling()), SECRET)


def a_front(_: object) -> ASGIApp:
    return create_front(SECRET, Router(), {})


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.fixture(params=[a_gateway, a_front])
def app(request: pytest.FixtureRequest, chat_format) -> ASGIApp:
    make: Callable[[object], ASGIApp] = request.param
    return make(chat_format)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_answers_are_sent_at_once(app: ASGIApp, http: aiohttp.ClientSession, host: str) -> None:
    """Nagle's algorithm holds an answer's body until the client acknowledges its head, which takes 40 ms."""
    if ":" in host and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    server = GatewayServer(app, GatewaySettings(host=host))
    await server.start()
    try:
        async with http.get(server.url + "/health") as answer:
            assert answer.status == 200
        accepted = [one.transport.get_extra_info("socket") for one in server._server.server_state.connections]
        assert accepted
        assert all(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in accepted)
    finally:
        await server.stop()
