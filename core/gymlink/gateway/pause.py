"""The gate that every generation passes: closed while the policy's weights are changed.

Calls that come to a closed gate are held, and go on by themselves when it opens; those inside end undisturbed. So a
weight update is: close, wait until nobody is inside, update, open.
"""

from __future__ import annotations

import asyncio

from gymlink.gateway.wire import WireError

RETRY_AFTER_S = 1
"""Told to who was held for too long. Short, because the next attempt is held as well."""


class Gate:
    """Used from one event loop.

    Args:
        hold_s: how long a call waits at the closed gate before it is sent away.
    """

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._opened = asyncio.Event()
        self._opened.set()
        self._emptied = asyncio.Event()
        self.inside = 0
        """Calls that have entered and not left."""

    @property
    def closed(self) -> bool:
        return not self._opened.is_set()

    def close(self) -> None:
        """From now on calls are held. Closing a closed gate is fine."""
        self._opened.clear()

    def open(self) -> None:
        """Let all who are held go on."""
        self._opened.set()

    async def enter(self) -> bool:
        """Pass, as soon as the gate is open; whether that took a wait. Who has entered calls `leave`.

        Raises:
            WireError: 429 with Retry-After, when the gate stayed closed for `hold_s`.
        """
        if waits := self.closed:
            await self._wait()
        self.inside += 1
        return waits

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(self._hold_s):
                while self.closed:  # it may have been closed again before this task had its turn
                    await self._opened.wait()
        except TimeoutError:
            raise WireError(
                429,
                f"The policy is paused for a weight update; this call was held for {self._hold_s:g} s. Try again.",
                kind="paused",
                retry_after_s=RETRY_AFTER_S,
            ) from None

    def leave(self) -> None:
        self.inside -= 1
        if not self.inside:
            self._emptied.set()

    async def drain(self, timeout_s: float) -> int:
        """Wait until nobody is inside; how many are, when `timeout_s` has passed."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.inside:
                    self._emptied.clear()
                    await self._emptied.wait()
        except TimeoutError:
            pass
        return self.inside
