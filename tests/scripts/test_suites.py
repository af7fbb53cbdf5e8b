"""scripts/suites.py: every outcome is counted, and a suite without a test fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Checkout

MIXED = """\
import pytest

def test_good(): pass
def test_bad(): assert False
def test_left_out(): pytest.skip("on purpose")

@pytest.fixture
def untidy():
    yield
    raise OSError("clean-up failed")

def test_bad_twice(untidy): assert False
def test_bad_after(untidy): pass

@pytest.fixture
def broken(): raise OSError("set-up failed")

def test_bad_before(broken): pass
"""

IN_VERLS = """\
import sys

def test_where(): assert sys.prefix.endswith(".venvs/verl")
"""

MEANWHILE = """\
import pathlib, time

def test_the_other_is_made_too():
    deadline = time.monotonic() + 120
    while not pathlib.Path(".venvs/verl/.gymlink-stamp").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
"""

WAITS = """\
import time, pytest

@pytest.fixture
def server():
    yield
    time.sleep(1)
    print("cleaned up", flush=True)

def test_long(server):
    print("waiting", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("code", "counts", "remark"),
    [
        (MIXED, (1, 4, 1), ""),
        ("def test_good(): pass", (1, 0, 0), ""),
        ("", (0, 1, 0), "no test was collected"),
        ("import no_such_module", (0, 1, 0), ""),
        ("import os\ndef test_crash(): os._exit(3)", (0, 1, 0), "the run broke down with exit status 3"),
    ],
)
def test_reads_what_pytest_reports(
    suites: ModuleType, tmp_path: Path, code: str, counts: tuple[int, int, int], remark: str
) -> None:
    (tmp_path / "test_it.py").write_text(code)
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", "test_it.py"]
    environ = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, check=False)
    assert suites.read(report, run.returncode) == (*counts, remark)


def test_prints_a_line_for_each_suite_and_the_counts_last(checkout: Checkout, suites: ModuleType) -> None:
    checkout.write_pyproject("pytest")
    for suite in suites.SUITES.values():
        for folder in suite.folders:
            (checkout.root / folder).mkdir(parents=True)
    tests = checkout.root / "tests"
    (tests / "core" / "test_it.py").write_text("def test_one(): pass\ndef test_two(): pass")
    (tests / "plugins" / "verl" / "test_where.py").write_text(IN_VERLS)
    three = ("core", "trl", "verl")  # the environment of another would take a minute
    nothing_in_trl = checkout.script("suites.py", *three)
    *_, core, trl, verl, total = nothing_in_trl.stdout.splitlines()
    assert core.startswith("suite core: 2 passed, 0 failed, 0 skipped (")
    assert trl.startswith("suite trl: 0 passed, 1 failed, 0 skipped (")
    assert trl.endswith("no test was collected")
    assert verl.startswith("suite verl: 1 passed, 0 failed, 0 skipped (")
    assert total == "3 passed, 1 failed, 0 skipped"
    assert nothing_in_trl.returncode == 1

    (tests / "e2e" / "test_all.py").write_text("def test_three(): pass")
    good = checkout.script("suites.py", *three)
    assert good.stdout.splitlines()[-1] == "4 passed, 0 failed, 0 skipped"
    assert good.returncode == 0

    chosen = checkout.script("suites.py", "core", "--", "-k", "one")
    assert chosen.stdout.splitlines()[-1] == "1 passed, 0 failed, 0 skipped"


def test_the_next_environment_is_made_while_a_suite_runs(checkout: Checkout, suites: ModuleType) -> None:
    checkout.write_pyproject("pytest")
    for suite in ("trl", "verl"):
        for folder in suites.SUITES[suite].folders:
            (checkout.root / folder).mkdir(parents=True)
    (checkout.root / "tests" / "e2e" / "test_it.py").write_text(MEANWHILE)
    (checkout.root / "tests" / "plugins" / "verl" / "test_where.py").write_text(IN_VERLS)
    both = checkout.script("suites.py", "trl", "verl")
    assert both.stdout.splitlines()[-1] == "2 passed, 0 failed, 0 skipped"


def test_without_a_name_every_suite_runs(suites: ModuleType) -> None:
    assert suites.parse(["--", "-x"]) == (None, list(suites.SUITES), ["-x"])
    assert suites.parse(["verl"]) == (None, ["verl"], [])


def test_every_trainer_has_its_suite_in_its_environment(suites: ModuleType, bootstrap: ModuleType) -> None:
    assert {suite.environment for suite in suites.SUITES.values()} == set(bootstrap.ENVIRONMENTS)


def test_an_unknown_suite_is_status_2(checkout: Checkout) -> None:
    answer = checkout.script("suites.py", "cores")
    assert answer.returncode == 2
    assert "No suite is called 'cores'; known: core, trl, verl, openrlhf." in answer.stderr


def test_ctrl_c_lets_the_tests_clean_up(checkout: Checkout, suites: ModuleType) -> None:
    checkout.write_pyproject("pytest")
    for name in suites.SUITES["core"].folders:
        path = checkout.root / name
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.touch()
    (checkout.root / "tests" / "core" / "test_it.py").write_text(WAITS)
    assert checkout.bootstrap("trl").returncode == 0
    command = [sys.executable, str(checkout.root / "scripts" / "suites.py"), "core", "--", "-s"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stdout is not None
        seen = []
        for line in run.stdout:
            seen.append(line)
            if "waiting" in line:
                os.killpg(run.pid, signal.SIGINT)
        assert run.wait(timeout=60) == 128 + signal.SIGINT
    assert "cleaned up\n" in "".join(seen)
