"""JSON over HTTP to a server that samples: many long calls at once over kept connections.

What comes back is the answer, or one of two errors: `EngineDownError` when there is nobody to answer, `AnsweredError`
when the server says that it will not. A cancelled call closes its connection, which is how these servers are told.
"""

from __future__ import annotations

import io
import time
from typing import Any

import aiohttp
import orjson

from gymlink.errors import EngineDownError, EngineError
from gymlink.packed import to_json

CONNECT_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 30.0
"""For a small question to a server that may be busy."""
KEPT_S = 2.0
"""Seconds that an idle connection is kept: less than the 5 s of uvicorn, or a call could meet one that is closing."""
UNAVAILABLE = frozenset({502, 503, 504})
"""Statuses that say "not here" or "not now": another replica may answer."""
_SHOWN = 500
"""Characters of an error answer that a message holds."""


class AnsweredError(EngineError):
    """The server answered with an error status.

    Attributes:
        status: the HTTP status.
        said: what the server said, in its own words.
    """

    def __init__(self, message: str, *, status: int, said: str) -> None:
        super().__init__(message)
        self.status = status
        self.said = said


class Connection:
    """One server, called by `name` in messages; used within one event loop.

    Args:
        timeout_s: how long an answer may take; None waits for as long as the caller does.
        connections: calls in flight at a time; more wait for a free one.
    """

    def __init__(
        self, name: str, url: str, *, api_key: str | None, timeout_s: float | None, connections: int = 4096
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.who = f"{name} at {self.url}"
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s
        self._connections = connections
        self._opened: aiohttp.ClientSession | None = None

    async def ask(self, method: str, path: str, body: Any = None, *, timeout_s: float | None = None) -> Any:
        """The server's answer, parsed; None when it is empty.

        Raises:
            EngineDownError: nobody answers, the connection broke, or the answer takes longer than `timeout_s`.
            AnsweredError: an error status, or an answer that is not JSON.
        """
        limit = self._timeout_s if timeout_s is None else timeout_s
        headers = self._headers | ({"Content-Type": "application/json"} if body is not None else {})
        # Not as bytes: aiohttp would write those in one piece, and warns of it.
        data = None if body is None else io.BytesIO(to_json(body))
        timeout = aiohttp.ClientTimeout(total=limit, sock_connect=CONNECT_TIMEOUT_S)
        started = time.monotonic()
        try:
            async with self._session().request(
                method, self.url + path, data=data, headers=headers, timeout=timeout
            ) as response:
                content = await response.read()
        except TimeoutError as error:  # aiohttp's own are of this kind too
            waited = time.monotonic() - started
            raise EngineDownError(
                f"{self.who} did not answer {path} within {waited:.1f} s: it hangs, is asleep or paused, or needs a "
                "longer timeout_s."
            ) from error
        except aiohttp.ClientError as error:
            reason = str(error) or type(error).__name__
            raise EngineDownError(f"{self.who} cannot be reached: {reason}.") from error
        return self._read(response.status, path, content)

    async def ask_if_known(self, method: str, path: str, body: Any = None) -> Any:
        """Like `ask`, soon; None where the server does not know the path."""
        try:
            return await self.ask(method, path, body, timeout_s=PROBE_TIMEOUT_S)
        except AnsweredError as error:
            if error.status in {404, 405}:
                return None
            raise

    def _read(self, status: int, path: str, content: bytes) -> Any:
        if status >= 400:  # noqa: PLR2004
            said = _said(content)
            message = f"{self.who} answered {path} with {status}: {said}"
            if status in UNAVAILABLE:
                raise EngineDownError(message)
            raise AnsweredError(message, status=status, said=said)
        try:
            return orjson.loads(content) if content.strip() else None
        except orjson.JSONDecodeError as error:
            said = _said(content)
            raise AnsweredError(
                f"{self.who} answered {path} with what is not JSON: {said}", status=status, said=said
            ) from error

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()
            self._opened = None

    def _session(self) -> aiohttp.ClientSession:
        # Made on first use: aiohttp ties a session to the loop that runs then.
        if self._opened is None:
            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=KEPT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._opened


def _said(content: bytes) -> str:
    """The message in an error answer, which servers wrap: {"error": {"message": ...}}, {"detail": ...} and the like."""
    text = content.decode("utf-8", errors="replace").strip()
    try:
        found = orjson.loads(content)
    except orjson.JSONDecodeError:
        found = None
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail") if key in found), None)
    if found is not None:
        text = found if isinstance(found, str) else orjson.dumps(found).decode()
    if not text:
        return "nothing"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
