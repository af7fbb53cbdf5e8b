"""Sends rows to Gym's agents: one connection pool, a deadline on every call, and no retries (the caller's choice).

No cookie is kept: Gym marks sessions by cookie, and two rollouts must never share one.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

import aiohttp
import orjson

from gymlink.errors import GymRequestError
from gymlink.types import FailureKind

_SHOWN = 500
"""Characters of an error answer that a message holds."""


class Addresses(Protocol):
    """Where a Gym's agents answer; `GymServers` is one."""

    @property
    def agents(self) -> Mapping[str, str]:
        """Base URL by agent name."""
        ...


class GymClient:
    """An asyncio client of a running Gym; an async context manager, used within one event loop.

    Args:
        gym: a running Gym.
        connections: calls in flight at a time; more wait, on their own deadline.
        secret: the bearer token that these addresses ask for; Gym's own ask for none.
    """

    def __init__(self, gym: Addresses, *, connections: int = 1024, secret: str | None = None) -> None:
        self._agents = gym.agents
        self._connections = connections
        self._headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        self._opened: aiohttp.ClientSession | None = None

    async def run(self, agent: str, row: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """One rollout: POST the row to the agent's /run.

        Returns:
            Gym's answer, with at least `reward` and `response`.

        Raises:
            GymRequestError: kind "http" (an error status, the rollout failed in Gym), "connection" (no server, or it
                hung up), "timeout" (no answer within `timeout_s`) or "answer" (not what /run promises).
        """
        url = self._agents.get(agent)
        if url is None:
            known = ", ".join(sorted(self._agents)) or "none"
            raise GymRequestError(f"No agent {agent!r} runs; running: {known}.", kind=FailureKind.CONNECTION)
        answer = await self._call("POST", f"{url}/run", timeout_s, what=f"agent {agent!r}", body=orjson.dumps(row))
        if not isinstance(answer, dict) or not isinstance(answer.get("reward"), int | float):
            raise GymRequestError(
                f"agent {agent!r} answered without a reward: {_short(orjson.dumps(answer))}",
                kind=FailureKind.ANSWER,
                status=200,
            )
        return answer

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()
            self._opened = None

    async def __aenter__(self) -> GymClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _session(self) -> aiohttp.ClientSession:
        # Made on first use: aiohttp ties a session to the loop that runs then.
        if self._opened is None:
            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=15),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
            )
        return self._opened

    async def _call(self, method: str, url: str, timeout_s: float, *, what: str, body: bytes | None = None) -> Any:
        started = time.monotonic()
        headers = self._headers | ({"Content-Type": "application/json"} if body is not None else {})
        # Not as bytes: aiohttp would write those in one piece, and warns of it.
        data = None if body is None else io.BytesIO(body)
        try:
            async with asyncio.timeout(timeout_s):
                async with self._session().request(method, url, data=data, headers=headers) as response:
                    content = await response.read()
        except TimeoutError as error:
            waited = time.monotonic() - started
            raise GymRequestError(
                f"{what} did not answer within {waited:.1f} s ({url}).", kind=FailureKind.TIMEOUT
            ) from error
        except aiohttp.ClientError as error:
            reason = str(error) or type(error).__name__
            raise GymRequestError(
                f"{what} cannot be reached at {url}: {reason}.", kind=FailureKind.CONNECTION
            ) from error
        if response.status >= 400:  # noqa: PLR2004
            raise GymRequestError(
                f"{what} answered {response.status}: {_short(content)}", kind=FailureKind.HTTP, status=response.status
            )
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise GymRequestError(
                f"{what} answered with what is not JSON: {_short(content)}",
                kind=FailureKind.ANSWER,
                status=response.status,
            ) from error


def _short(content: bytes) -> str:
    """The useful part of an error answer: the text without its quoting, and both ends of it when it is long.

    Gym nests the answers of inner servers into each other; the outermost says where, the innermost says what.
    """
    text = content.decode("utf-8", errors="replace").strip()
    try:
        decoded = orjson.loads(content)
    except orjson.JSONDecodeError:
        decoded = None
    if isinstance(decoded, str):
        text = decoded
    elif isinstance(decoded, dict) and "detail" in decoded:
        text = orjson.dumps(decoded["detail"]).decode()
    text = text.replace("\\", "")
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} ... {text[-half:]}"
