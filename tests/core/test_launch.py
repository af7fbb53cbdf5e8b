"""`run_trainer`: what it starts, how it ends, and how the reason comes back. A small program stands for a trainer's."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from gymlink import errors
from gymlink.errors import ConfigError, ContextOverflowError, GymlinkError, GymRequestError, RolloutError
from gymlink.launch import ERROR_FILE, GrowingFile, note_error, noted_error, run_trainer


class Program:
    """A program of the test's own, its folder, and the run's."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        self.run_dir.mkdir()

    def run(self, code: str, *arguments: str, **more: Any) -> str:
        said = self.folder / "said"
        command = [sys.executable, "-c", code, *arguments]
        with said.open("wb") as output:
            run_trainer(command, name="it", run_dir=self.run_dir, output=output, env={"MINE": "1"}, **more)
        return said.read_text()


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def test_the_program_gets_its_arguments_as_they_are(program: Program) -> None:
    arguments = ["+gymlink=gym", "trainer.project_name='it is \\'mine\\''", "--a.b", "[a,b]"]
    code = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['MINE'], os.getcwd()]))"
    calls: list[float] = []
    said = json.loads(program.run(code, *arguments, meanwhile=lambda: calls.append(time.monotonic())))
    assert said == [arguments, "1", str(Path.cwd())]
    assert calls, "it is called at least when all is over"


def test_an_end_with_an_error_is_told(program: Program) -> None:
    with pytest.raises(RolloutError, match="it ended with exit status 3; what it said before"):
        program.run("import sys; sys.exit(3)")


def test_the_end_of_its_log_is_told(program: Program) -> None:
    with pytest.raises(RolloutError, match=r"exit status 3\. .*said ends with:\n.*a door that is shut"):
        program.run("import sys; print('a door that is shut'); sys.exit(3)", log=program.folder / "said")


def test_the_reason_that_was_left_is_raised(program: Program) -> None:
    left = f"open({str(program.run_dir / ERROR_FILE)!r}, 'w').write('ConfigError: the door: no such agent'); "
    with pytest.raises(ConfigError, match="the door: no such agent"):
        program.run(f"import sys; {left} sys.exit(1)")
    program.run(left)  # an end without an error is one, whatever was said on the way


def test_the_reason_of_an_earlier_run_is_forgotten(program: Program) -> None:
    note_error(program.run_dir, ConfigError("long ago"))
    with pytest.raises(RolloutError, match="exit status 3"):
        program.run("import sys; sys.exit(3)")


def test_with_the_wait_the_program_ends(program: Program) -> None:
    """What it started is ended with it, as Ctrl-C would."""
    pids = program.folder / "pids"
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        f"open({str(pids)!r} + '.part', 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"os.rename({str(pids)!r} + '.part', {str(pids)!r})\n"
        "time.sleep(600)\n"
    )

    def interrupt() -> None:
        if pids.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        program.run(code, meanwhile=interrupt)
    assert [pid for pid in map(int, pids.read_text().split()) if psutil.pid_exists(pid)] == []


PLAIN = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, GymlinkError) and "__init__" not in vars(kind)
]


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
def test_an_error_comes_back_as_it_was(kind: type[GymlinkError], tmp_path: Path) -> None:
    error = kind("gym.yaml: no key 'x'\nthe last lines:\n  a: b")
    note_error(tmp_path, error)
    noted = noted_error(tmp_path)
    assert type(noted) is kind
    assert str(noted) == str(error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (GymRequestError("no answer", kind="timeout", status=504), errors.GymError),
        (ContextOverflowError(9, 8), errors.EngineError),
    ],
    ids=["GymRequestError", "ContextOverflowError"],
)
def test_an_error_that_holds_more_than_words_comes_back_as_its_parent(
    error: GymlinkError, kind: type[GymlinkError], tmp_path: Path
) -> None:
    note_error(tmp_path, error)
    noted = noted_error(tmp_path)
    assert type(noted) is kind
    assert str(noted) == str(error)


def test_an_error_of_others_is_told_with_its_name(tmp_path: Path) -> None:
    note_error(tmp_path, KeyError("x"))
    assert str(noted_error(tmp_path)) == "KeyError: 'x'"
    assert type(noted_error(tmp_path)) is RolloutError


def test_the_first_word_stays(tmp_path: Path) -> None:
    note_error(tmp_path, ConfigError("the cause"))
    note_error(tmp_path, RolloutError("what followed"))
    assert str(noted_error(tmp_path)) == "the cause"
    assert noted_error(tmp_path / "nowhere") is None


def test_a_file_that_grows_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = GrowingFile(path)
    assert lines.new_lines() == []
    with path.open("wb", buffering=0) as file:
        file.write("one\r\ntwo\u2028two\n\nth".encode())
        assert lines.new_lines() == ["one", "two\u2028two"]
        assert lines.new_lines() == []
        file.write(b"ree\r 50%\xff\nfour")
        assert lines.new_lines() == ["three", " 50%\ufffd"]
