"""A program that a test runs to its end, and finding what it has left behind.

It is started without a guard, so that what it leaves is seen; then that is ended here, whatever happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

MARK = "GYMLINK_TEST_MARK"


def marked(mark: str) -> list[psutil.Process]:
    """The processes that carry this value of `MARK`; those that have ended and wait for their parent are left out."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


PATIENCE_S = 20.0
"""How long what a program started may outlast it."""


@dataclass(frozen=True)
class Ended:
    """A program that has ended. `left` names the processes that were still there `PATIENCE_S` later."""

    status: int
    seconds: float
    left: tuple[str, ...]


def run_program(
    arguments: Sequence[str], folder: Path, log: Path, *, env: Mapping[str, str], timeout_s: float
) -> Ended:
    """Run this Python with these arguments in `folder`, with a Ray folder of its own."""
    with _marked_environment(env) as environment:
        started = time.monotonic()
        status = _run(arguments, folder, log, environment, timeout_s)
        seconds = time.monotonic() - started
        left = _wait_for_the_end(environment[MARK])
    return Ended(status, seconds, left)


@contextlib.contextmanager
def _marked_environment(more: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """An environment for a program; when it is left, all that carries its mark is ended."""
    mark = uuid.uuid4().hex
    ray_folder = tempfile.mkdtemp(prefix="r-run-", dir="/tmp")  # Ray's sockets need a short name
    try:
        yield {**os.environ, MARK: mark, "RAY_TMPDIR": ray_folder, **more}
    finally:
        for _ in range(5):  # a process may start another while it is being ended
            psutil.wait_procs(list(map(_killed, marked(mark))), timeout=2)
        shutil.rmtree(ray_folder, ignore_errors=True)


def _run(arguments: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str], timeout_s: float) -> int:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout_s)
        finally:
            process.kill()
            process.wait()


def _wait_for_the_end(mark: str) -> tuple[str, ...]:
    """The names of a program's processes that do not end."""
    deadline = time.monotonic() + PATIENCE_S
    while (there := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return tuple(_name(process) for process in there)


def _killed(process: psutil.Process) -> psutil.Process:
    with contextlib.suppress(psutil.Error):
        process.kill()
    return process


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:200]
    except psutil.Error:
        return "?"


def json_lines(path: Path) -> list[dict[str, Any]]:
    with path.open() as lines:  # str.splitlines would also split at characters that JSON leaves as they are
        return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class GymRun:
    """A trainer's run that has ended, in `folder`, with gymlink's part of it in `gym` there."""

    folder: Path
    log: str
    ended: Ended

    @property
    def status(self) -> int:
        return self.ended.status

    @property
    def left(self) -> tuple[str, ...]:
        """The processes that outlasted it."""
        return self.ended.left

    @cached_property
    def said(self) -> str:
        return (self.folder / self.log).read_text(errors="replace")

    @cached_property
    def error(self) -> str | None:
        """Why gymlink stopped the run."""
        path = self.folder / "gym" / "error.txt"
        return path.read_text() if path.exists() else None

    @cached_property
    def rollouts(self) -> list[dict[str, Any]]:
        """What was collected, of every split, in the order in which it ended."""
        path = self.folder / "gym" / "rollouts.jsonl"
        return json_lines(path) if path.exists() else []
