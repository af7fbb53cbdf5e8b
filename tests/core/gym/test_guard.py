"""A real process tree: a command that starts a child, and a daemon in a session of its own that its parent forgets."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gymlink.gym.guard import GuardedProcess, marked

TREE = """
import os, signal, subprocess, sys, time
from pathlib import Path
mode, out = sys.argv[1], Path(sys.argv[2])
sleep = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]
child = subprocess.Popen(sleep)
if os.fork() == 0:
    os.setsid()
    daemon = subprocess.Popen(sleep, start_new_session=True)
    (out / "daemon").write_text(str(daemon.pid))
    os._exit(0)
os.wait()
(out / "pids").write_text(f"{os.getpid()} {child.pid} {(out / 'daemon').read_text()}")
if mode == "polite":
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        (out / "interrupted").touch()
        sys.exit(3)
if mode == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(600)
sys.exit(7)
"""

PARENT = """
import os, sys, time
from pathlib import Path
from gymlink.gym.guard import GuardedProcess
out = Path(sys.argv[1])
process = GuardedProcess([sys.executable, "-c", sys.argv[2], "polite", str(out)],
                         env=dict(os.environ), cwd=out, output=open(out / "log", "wb"), remove=out / "private")
if os.fork() == 0:  # holds a copy of the lifeline, as a data loader's worker would
    time.sleep(20)
    os._exit(0)
time.sleep(600)
"""


def start(tmp_path: Path, mode: str) -> GuardedProcess:
    with (tmp_path / "log").open("wb") as log:
        return GuardedProcess(
            [sys.executable, "-c", TREE, mode, str(tmp_path)], env=dict(os.environ), cwd=tmp_path, output=log
        )


def tree(tmp_path: Path) -> list[psutil.Process]:
    """The command, its child and its daemon, once all three run."""
    deadline = time.monotonic() + 20
    while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 3:
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    return [psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split()]


def gone(processes: list[psutil.Process], within_s: float) -> bool:
    return not psutil.wait_procs(processes, timeout=within_s)[1]


def test_stop_interrupts_and_leaves_nothing(tmp_path: Path) -> None:
    process = start(tmp_path, "polite")
    processes = tree(tmp_path)
    assert {found.pid for found in processes} <= set(process.pids)
    process.stop()
    process.stop()
    assert gone(processes, 0)
    assert (tmp_path / "interrupted").exists()
    assert process.returncode == 3
    assert process.pids == ()


def test_a_command_that_ignores_everything_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "deaf")
    processes = tree(tmp_path)
    started = time.monotonic()
    process.stop()
    assert gone(processes, 0)
    assert time.monotonic() - started < 8


def test_what_a_command_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    process = start(tmp_path, "ends")
    assert process.wait(20) == 7
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    process.stop()


@pytest.mark.parametrize("generation", [0, 1])
def test_stop_cleans_up_after_a_guard_that_was_killed(tmp_path: Path, generation: int) -> None:
    process = start(tmp_path, "polite")
    processes = tree(tmp_path)
    os.kill(process.pids[generation], signal.SIGKILL)
    process.stop()
    assert gone(processes, 5)
    assert marked(process.mark) == []


def test_a_parent_that_kills_its_children_does_not_kill_the_guard(tmp_path: Path) -> None:
    process = start(tmp_path, "polite")
    processes = tree(tmp_path)
    (child,) = psutil.Process().children()
    child.kill()
    assert gone(processes, 10)
    process.stop()


def test_a_guard_under_a_guard_cleans_up_behind_itself(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    command = [sys.executable, "-c", PARENT, str(tmp_path), TREE]
    with (tmp_path / "outer").open("wb") as log:
        outer = GuardedProcess(command, env=dict(os.environ), cwd=tmp_path, output=log)
    processes = tree(tmp_path)
    outer.stop()
    assert gone(processes, 5)
    assert not (tmp_path / "private").exists()


@pytest.mark.parametrize("whole_group", [False, True])
def test_nothing_outlives_a_parent_that_is_killed(tmp_path: Path, whole_group: bool) -> None:
    (tmp_path / "private").mkdir()
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), TREE], start_new_session=True)
    try:
        processes = tree(tmp_path)
        guard = psutil.Process(processes[0].ppid())
        if whole_group:
            os.killpg(parent.pid, signal.SIGKILL)
        else:
            parent.kill()
        assert gone([*processes, guard], 10)
        assert not (tmp_path / "private").exists()
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
        for worker in psutil.process_iter(["pid"]):
            if worker.pid != parent.pid and _group(worker.pid) == parent.pid:
                worker.kill()


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def test_a_command_that_does_not_exist_is_an_exit_status(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        process = GuardedProcess(["/nowhere/gym"], env=dict(os.environ), cwd=tmp_path, output=log)
    assert process.wait(20) == 1
    assert "/nowhere/gym" in (tmp_path / "log").read_text()
    process.stop()
