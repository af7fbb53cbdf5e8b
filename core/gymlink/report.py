"""Says on a console what is being waited for: a spinner on a terminal, and elsewhere a line when something changes."""

from __future__ import annotations

import re
import time

from rich.console import Console
from rich.status import Status

_SECONDS = re.compile(r" \(\d+ s\)$")
REPEAT_S = 15.0
"""Without a terminal, the same wait is told again after this long."""


class Reporter:
    """A `report` function for whatever takes one: called with a few words, as often as one likes.

    On a terminal the words replace each other behind a spinner until `done`; without one, a line is printed when the
    words change (a trailing "(12 s)" aside) or when `REPEAT_S` have passed.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._said = ""
        self._said_at = 0.0

    def __call__(self, text: str) -> None:
        if self._console.is_terminal:
            self._spin(text)
            return
        words, now = _SECONDS.sub("", text), time.monotonic()
        if words != self._said or now - self._said_at >= REPEAT_S:
            self._said, self._said_at = words, now
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def done(self) -> None:
        """Nothing is waited for any more: take the spinner away."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _spin(self, text: str) -> None:
        if self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)
