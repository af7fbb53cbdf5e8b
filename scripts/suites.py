#!/usr/bin/env python3
"""Runs test suites by name, each in its environment, and counts what came of them.

    python3 scripts/suites.py [--parent PID] [SUITE...] [-- PYTEST ARGUMENTS...]

Promise: one line for each suite and, last of all, one line `N passed, N failed, N skipped`, whatever happens. A suite
that collected no test, or whose run broke down, counts as failed. Exit status 1 when anything failed. While one suite
runs, the next one's environment is made.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from bootstrap import ROOT, BootstrapError, end_with_parent, guarded

NO_TESTS_COLLECTED = 5  # pytest.ExitCode


class Suite(NamedTuple):
    environment: str
    folders: tuple[str, ...]


SUITES = {
    "core": Suite(
        "trl", ("tests/core", "tests/contract", "tests/docs", "tests/scripts", "tests/parity/test_recording.py")
    ),
    "trl": Suite("trl", ("tests/plugins/transformers", "tests/plugins/trl", "tests/parity/test_trl.py", "tests/e2e")),
    "verl": Suite("verl", ("tests/plugins/ray", "tests/plugins/verl", "tests/parity/test_verl.py")),
    # Its environment has vLLM for the CPU.
    "openrlhf": Suite("openrlhf", ("tests/engines", "tests/plugins/openrlhf", "tests/parity/test_openrlhf.py")),
}


class Outcome(NamedTuple):
    """How many tests passed, failed and were skipped. What broke down outside of a test counts as one that failed."""

    passed: int
    failed: int
    skipped: int
    remark: str = ""

    def plus(self, other: Outcome) -> Outcome:
        return Outcome(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def run(name: str, arguments: Sequence[str], following: str | None = None) -> Outcome:
    """Run one suite; its output goes where ours goes. `following` is the suite that comes after it."""
    suite = SUITES[name]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        status = call(bootstrap(suite.environment))  # by itself: the next one's would race it for the lock
        if status == 0:
            with made_meanwhile(SUITES[following].environment if following else suite.environment):
                pytest = ["pytest", f"--junitxml={report}", *suite.folders, *arguments]
                status = call(bootstrap(suite.environment, "--", *pytest))
        return read(report, status)


def bootstrap(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "bootstrap.py"), "--parent", str(os.getpid()), *arguments]


@contextlib.contextmanager
def made_meanwhile(environment: str) -> Iterator[None]:
    """Make an environment in silence: what fails is tried again, and told, when its suite's turn has come."""
    nothing = subprocess.DEVNULL
    with subprocess.Popen(bootstrap(environment), stdin=nothing, stdout=nothing, stderr=nothing) as making:
        try:
            yield
        except BaseException:
            making.terminate()
            raise


def call(command: Sequence[str]) -> int:
    """Leave Ctrl-C to the command, whose tests must stop their servers, and heed it once that is done."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        status = subprocess.call(list(command), cwd=str(ROOT))
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
    return status


def read(report: Path, status: int) -> Outcome:
    """The outcome told by pytest's JUnit report and exit status."""
    try:
        cases = ElementTree.parse(str(report)).getroot().iter("testcase")
    except (OSError, ElementTree.ParseError):
        return Outcome(0, 1, 0, f"the run broke down with exit status {status}")
    marks: dict[tuple[str | None, str | None], set[str]] = {}
    for case in cases:  # a test that fails and then fails to clean up is told twice
        marks.setdefault((case.get("classname"), case.get("name")), set()).update(mark.tag for mark in case)
    failed = sum(1 for seen in marks.values() if seen & {"failure", "error"})
    skipped = sum(1 for seen in marks.values() if "skipped" in seen and not seen & {"failure", "error"})
    outcome = Outcome(len(marks) - failed - skipped, failed, skipped)
    if status == NO_TESTS_COLLECTED or not marks:
        return outcome._replace(failed=failed + 1, remark="no test was collected")
    if status and not failed:
        return outcome._replace(failed=1, remark=f"the run broke down with exit status {status}")
    return outcome


def parse(arguments: Sequence[str]) -> tuple[int | None, list[str], list[str]]:
    """Give (parent, suites, arguments for pytest)."""
    own, for_pytest = list(arguments), []
    if "--" in own:
        at = own.index("--")
        own, for_pytest = own[:at], own[at + 1 :]
    parent = None
    if own[:1] == ["--parent"] and own[1:] and own[1].isdigit():
        parent, own = int(own[1]), own[2:]
    unknown = [name for name in own if name not in SUITES]
    if unknown:
        raise BootstrapError(f"No suite is called {unknown[0]!r}; known: {', '.join(SUITES)}.", status=2)
    return parent, own or list(SUITES), for_pytest


def main() -> int:
    parent, names, arguments = parse(sys.argv[1:])
    if parent is not None:
        end_with_parent(parent)
    lines, total = [], Outcome(0, 0, 0)
    for name, following in zip_longest(names, names[1:]):
        started = time.monotonic()
        outcome = run(name, arguments, following)
        seconds = time.monotonic() - started
        lines.append(f"suite {name}: {outcome} ({seconds:.0f} s){': ' if outcome.remark else ''}{outcome.remark}")
        total = total.plus(outcome)
    print("", *lines, total, sep="\n", flush=True)
    return 1 if total.failed else 0


if __name__ == "__main__":
    guarded(main)
