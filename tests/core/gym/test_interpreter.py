import sys
from pathlib import Path

import pytest

from gymlink.errors import ConfigError
from gymlink.gym.interpreter import find_interpreter, needed_python


@pytest.fixture
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No interpreter anywhere that is searched, but for what a test puts into the returned PATH folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "nothing"))
    return folder


def fake_python(path: Path, version: str, base: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\necho \'["{version}", "cpython", "{base or path}"]\'\n')
    path.chmod(0o755)
    return path


def broken_shim(path: Path) -> None:
    path.write_text("#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    path.chmod(0o755)


def test_what_each_gym_needs() -> None:
    assert needed_python("0.4.0") == ("3.12", "3.12.0")
    assert needed_python("0.5.0") == needed_python("0.7.0") == ("3.13", "3.13.14")


def test_a_shim_that_fails_is_passed_over(empty_machine: Path, tmp_path: Path) -> None:
    broken_shim(empty_machine / "python3.12")
    real = fake_python(tmp_path / "pyenv/versions/3.12.4/bin/python3.12", "3.12.4")
    assert find_interpreter(None, "0.4.0").path == real


def test_uv_interpreters_are_found(empty_machine: Path, tmp_path: Path) -> None:
    real = fake_python(tmp_path / "uv/cpython-3.12.9-linux-x86_64-gnu/bin/python3.12", "3.12.9")
    assert find_interpreter(None, "0.4.0").path == real


def test_a_virtual_environment_stands_for_its_base(empty_machine: Path, tmp_path: Path) -> None:
    fake_python(empty_machine / "python3", "3.12.4", base="/base/python")
    assert find_interpreter(None, "0.4.0").path == Path("/base/python")


def test_too_old_in_the_right_series_is_refused(empty_machine: Path) -> None:
    fake_python(empty_machine / "python3.13", "3.13.0")
    with pytest.raises(ConfigError, match=r"python3\.13 is 3\.13\.0"):
        find_interpreter(None, "0.7.0")


def test_nothing_found_says_what_was_searched_and_what_to_do(empty_machine: Path, tmp_path: Path) -> None:
    broken_shim(empty_machine / "python3.12")
    with pytest.raises(ConfigError) as raised:
        find_interpreter(None, "0.4.0")
    for part in (
        "3.12",
        "PATH",
        str(tmp_path / "uv"),
        "pyenv/versions",
        "does not run",
        "gym.python",
        "uv python install",
    ):
        assert part in str(raised.value)


def test_a_version_may_be_asked_for(empty_machine: Path) -> None:
    fake_python(empty_machine / "python3.13", "3.13.2")
    fake_python(empty_machine / "python3.12", "3.12.4")
    assert find_interpreter("3.13", "0.4.0").version == "3.13.2"
    with pytest.raises(ConfigError, match=r"gym\.python asks for 3\.12\.9"):
        find_interpreter("3.12.9", "0.4.0")


@pytest.mark.parametrize(
    ("path", "message"),
    [("/nowhere/python", "there is no such file"), ("/bin/true", "it does not run")],
)
def test_a_path_that_cannot_be_used(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"gym\.python: cannot use '{path}': {message}"):
        find_interpreter(path, "0.4.0")


def test_a_path_that_is_too_old(tmp_path: Path) -> None:
    old = fake_python(tmp_path / "python", "3.11.7")
    with pytest.raises(ConfigError, match=r"is Python 3\.11\.7, and NeMo Gym 0\.4\.0 needs 3\.12\.0"):
        find_interpreter(str(old), "0.4.0")
