"""A trainer's own program, run as a program of its own that leaves nothing behind.

It runs under guard: with it end the Ray that it started and all that runs in it, also when this process is killed. Why
a run was stopped is left in a file by the part of gymlink that stopped it, in whichever process that was, and is raised
here as what it was. What the program says is read from its log as it grows.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from gymlink import errors
from gymlink.errors import GymlinkError, RolloutError
from gymlink.gym.guard import GuardedProcess
from gymlink.gym.install import last_lines

ERROR_FILE = "error.txt"
"""In the run's folder: why the run was stopped, for whoever started it."""
SAYS = "gymlink: "
"""Begins what gymlink's part of a program says in its log."""
POLL_S = 0.2
LAST_LINES = 8


def run_trainer(
    command: Sequence[str],
    *,
    name: str,
    run_dir: Path,
    output: IO[bytes],
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Run a trainer's program in the working directory, and wait for its end.

    Args:
        command: the program and its arguments.
        name: the trainer's, for messages.
        run_dir: the folder in which gymlink's part of the program notes an error.
        output: takes what the program says.
        log: where that can be read afterwards, when it is a file.
        env: added to this process's environment.
        meanwhile: called a few times a second while the program runs, and once after.

    Raises:
        GymlinkError: the program ended with an error; the one that gymlink's part of it raised, where it was that.
    """
    (run_dir / ERROR_FILE).unlink(missing_ok=True)
    process = GuardedProcess(command, env={**os.environ, **(env or {})}, cwd=Path.cwd(), output=output)
    try:
        while (status := process.returncode) is None:
            if meanwhile is not None:
                meanwhile()
            time.sleep(POLL_S)
    finally:
        process.stop()
    if meanwhile is not None:
        meanwhile()
    if status:
        raise noted_error(run_dir) or RolloutError(f"{name} ended with exit status {status}{_said(log)}")


def _said(log: Path | None) -> str:
    if log is None:
        return "; what it said before tells why."
    return f". {log} ends with:\n" + last_lines(log, LAST_LINES)


def note_error(run_dir: Path, error: Exception) -> None:
    """Leave word of why the run is being stopped. The first word stays: what follows from it is noise."""
    path = run_dir / ERROR_FILE
    if not path.exists():
        path.write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")


def noted_error(run_dir: Path) -> GymlinkError | None:
    """What `note_error` left, as the error it was; as its parent where it holds more than its message."""
    try:
        text = (run_dir / ERROR_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    name, _, message = text.partition(": ")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, GymlinkError):
        plain: type[GymlinkError] = next(one for one in kind.__mro__ if "__init__" not in vars(one))
        return plain(message)
    return RolloutError(text)


def standard_output() -> IO[bytes]:
    """This process's own, for what a trainer's program says; its file descriptor is handed over."""
    try:
        sys.stdout.fileno()
    except (OSError, ValueError):  # captured, by a test for one
        return open(os.devnull, "wb")  # noqa: PTH123
    return sys.stdout.buffer


class GrowingFile:
    """The lines of a file that another process writes, which need not be there yet.

    A carriage return ends a line too: a progress bar writes over itself with one. Empty lines are passed over.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new_lines(self) -> list[str]:
        """Those that were completed since the last call, bytes that are no UTF-8 replaced."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        end = text.rfind(b"\n") + 1
        self._offset += end
        # Not `str.splitlines`, for which U+2028 in a JSON string is an end too.
        return [line.decode(errors="replace") for line in text[:end].splitlines() if line]
