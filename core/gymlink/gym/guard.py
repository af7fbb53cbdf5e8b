"""Runs a command that never outlives its parent: no orphans, whatever ends the parent.

`GuardedProcess` starts this same file as a small process in a session of its own, so that no signal to the parent's
group reaches it. That guard holds one end of a pipe. When the pipe closes, when the parent is gone (even by SIGKILL),
or when it is told to stop, it interrupts the command as Ctrl-C would, and after a grace period ends every descendant,
daemons included: on Linux it is the subreaper to which they fall. Elsewhere they are known by a variable in their
environment. It never touches a process that did not come from its command.

The guard is the parent's grandchild: some parents are ended together with their children (Ray kills the children of an
actor that ends). The child in between waits for the guard, and no longer than the parent lives; without it, the guard
knows that its parent is gone.

Standard library and psutil only, and no import from gymlink: the guard is up in some 50 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

MARK = "GYMLINK_GUARD"
"""The environment variable by which a guarded process is known; its value names the guard."""
GRACE_S = 3.0
"""From the interrupt to the end by force: time for servers to close, not for all of Ray to wind down."""
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.2


class GuardedProcess:
    """A command under guard, seen from its parent.

    Args:
        command: what to run; found on the PATH of `env`.
        env: the whole environment of the command.
        cwd: where it runs.
        output: takes its standard output and error.
        remove: a folder to remove when all is over, even when the parent is gone by then.
        keep_open: file descriptors to hold open until the end (not handed to the command).
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        output: IO[bytes],
        remove: Path | None = None,
        keep_open: Sequence[int] = (),
    ) -> None:
        self.mark = uuid.uuid4().hex
        self._remove = remove
        read_end, self._lifeline = os.pipe()
        arguments = ["--lifeline", str(read_end), "--mark", self.mark]
        if remove is not None:
            arguments += ["--remove", str(remove)]
        try:
            self._process = subprocess.Popen(
                # -P: the folder of this file must not shadow modules of the standard library.
                [sys.executable, "-P", str(Path(__file__).resolve()), *arguments, "--", *command],
                env={**env, MARK: self.mark},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(read_end, *keep_open),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(read_end)

    @property
    def returncode(self) -> int | None:
        """The command's exit status (128 + n for signal n), or None while it runs."""
        return self._process.poll()

    @property
    def pids(self) -> tuple[int, ...]:
        """The guard and all that runs under it now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            guard = psutil.Process(self._process.pid)
            return (guard.pid, *(child.pid for child in guard.children(recursive=True)))
        return ()

    def wait(self, timeout_s: float) -> int | None:
        """The exit status, or None when it still runs after `timeout_s`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def stop(self) -> None:
        """End the command and all that came from it. Returns when nothing of it is left; may be called again."""
        if self._lifeline >= 0:
            with contextlib.suppress(OSError):
                # Closing is not enough: a forked child of ours may hold a copy of this end.
                os.write(self._lifeline, b"stop")
            os.close(self._lifeline)
            self._lifeline = -1
        if self.wait(GRACE_S + 15) is None:
            self._process.kill()
            self._process.wait()
        if self._process.returncode < 0:  # it was killed, and the guard may not have ended yet
            _clean_up(self.mark, self._remove)


def marked(mark: str) -> list[psutil.Process]:
    """All processes of this machine that carry `mark`; those of other users cannot be read and are skipped."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def end(processes: Iterable[psutil.Process], patience_s: float = 1.0) -> None:
    """Ask the processes to terminate, then kill those that have not."""
    remaining = list(processes)
    for process in remaining:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, remaining = psutil.wait_procs(remaining, timeout=patience_s)
    for process in remaining:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(remaining, timeout=patience_s)


def _clean_up(mark: str, remove: Path | None) -> None:
    """What a guard that was killed can no longer do."""
    end(marked(mark))
    if remove is not None:
        shutil.rmtree(remove, ignore_errors=True)


# From here on: inside the guard.


class _Guard:
    def __init__(self, command: Sequence[str], *, lifeline: int, mark: str) -> None:
        self._lifeline = lifeline
        self._mark = mark
        self._parent = os.getppid()
        self._told_to_stop = False
        self._status: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # A handled signal is back at its default in the command, also when our parent ignored it.
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._is_subreaper = _become_subreaper()
        self._command = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)

    def run(self) -> int:
        while self._status is None and not self._should_stop():
            self._reap()
        if self._status is None:
            self._interrupt()
        self._end_descendants()
        return self._status if self._status is not None else 128 + signal.SIGKILL

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._told_to_stop = True

    def _should_stop(self) -> bool:
        readable, _, _ = select.select([self._lifeline], [], [], _POLL_S)
        return bool(readable) or self._told_to_stop or os.getppid() != self._parent

    def _reap(self) -> None:
        """Collect every child that ended: the command, and the orphans that fell to us."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._command.pid:
                    code = os.waitstatus_to_exitcode(status)
                    self._status = self._command.returncode = code if code >= 0 else 128 - code

    def _interrupt(self) -> None:
        """Ctrl-C to the command's whole group, as a terminal would send it, then the grace period."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._command.pid, signal.SIGINT)
        deadline = time.monotonic() + GRACE_S
        while self._status is None and time.monotonic() < deadline:
            time.sleep(0.05)
            self._reap()

    def _end_descendants(self) -> None:
        self._end_guards()
        # Again until none is left: a process may start another while it is being ended.
        for patience_s in (1.0, 0.2, 0.2, 0.2, 0.2):
            remaining = self._descendants()
            if not remaining:
                break
            end(remaining, patience_s)
            self._reap()
        self._reap()

    def _end_guards(self) -> None:
        """Guards among the descendants clean up behind themselves: they have the time that this takes."""
        guards = [process for process in self._descendants() if _is_guard(process)]
        for guard in guards:
            with contextlib.suppress(psutil.Error):
                guard.terminate()
        psutil.wait_procs(guards, timeout=GRACE_S + 5)

    def _descendants(self) -> list[psutil.Process]:
        children = psutil.Process().children(recursive=True)
        if self._is_subreaper:
            return children
        return [process for process in {*children, *marked(self._mark)} if process.pid != self._parent]


def _is_guard(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return str(Path(__file__).resolve()) in process.cmdline()
    return False


def _become_subreaper() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    return False


def _wait_for(guard: int, parent: int) -> int:
    """The guard's exit status (-n for signal n), unless the parent ends before."""
    while os.getppid() == parent:
        pid, status = os.waitpid(guard, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_POLL_S)
    return 128 + signal.SIGHUP


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lifeline", type=int, required=True)
    parser.add_argument("--mark", required=True)
    parser.add_argument("--remove", type=Path)
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    parent = os.getppid()
    if guard := os.fork():
        status = _wait_for(guard, parent)
        if status < 0:  # the guard itself was killed
            _clean_up(given.mark, given.remove)
        return status if status >= 0 else 128 - status
    try:
        return _Guard(given.command, lifeline=given.lifeline, mark=given.mark).run()
    finally:
        if given.remove is not None:
            shutil.rmtree(given.remove, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
