"""Finds the Python interpreter on which NeMo Gym can run; it is rarely the trainer's own.

Every candidate is proven by running it, because a name says little: pyenv's shims answer to `python3.12` and fail,
and a virtual environment's interpreter stands for another one. What is returned is always a base interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from gymlink.errors import ConfigError

_PROBE = (
    "import json, platform, sys; "
    "print(json.dumps([platform.python_version(), sys.implementation.name, sys._base_executable]))"
)
_PROBE_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A base interpreter that was seen to run."""

    path: Path
    version: str


def needed_python(gym_version: str) -> tuple[str, str]:
    """What nemo-gym needs: the series to look for, such as "3.12", and the least version, such as "3.12.0".

    From its `requires-python`: >=3.12 before 0.5, >=3.13.14 since.
    """
    return ("3.12", "3.12.0") if Version(gym_version) < Version("0.5.dev0") else ("3.13", "3.13.14")


def find_interpreter(python: str | None, gym_version: str) -> Interpreter:
    """The interpreter for this nemo-gym: the one asked for by path or version, else the first that is found.

    Raises:
        ConfigError: none fits; says what was searched and how to give one.
    """
    series, least = needed_python(gym_version)
    if python is not None and not _is_version(python):
        return _given(python, gym_version, least)
    wanted = python or series
    rejected = []
    for candidate in _candidates(wanted):
        found = _probe(candidate)
        if found is None:
            rejected.append(f"{candidate} does not run")
        elif not _matches(found.version, wanted) or Version(found.version) < Version(least):
            rejected.append(f"{candidate} is {found.version}")
        else:
            return found
    tried = f" Tried: {'; '.join(rejected)}." if rejected else ""
    places = ", ".join(["PATH", *(str(folder) for folder in _install_folders())])
    need = f"gym.python asks for {python}" if python else f"it is built for Python {series}, {least} or newer"
    raise ConfigError(
        f"No interpreter for NeMo Gym {gym_version} was found: {need}. Searched: {places}.{tried} "
        f"Install one (`uv python install {series}`), or give its path as `gym.python`."
    )


def _given(python: str, gym_version: str, least: str) -> Interpreter:
    path = Path(python).expanduser()
    found = _probe(path)
    if found is None:
        why = "it does not run" if path.exists() else "there is no such file"
        raise ConfigError(f"gym.python: cannot use {python!r}: {why}. Give the path of a Python {least} or newer.")
    if Version(found.version) < Version(least):
        raise ConfigError(
            f"gym.python: {python!r} is Python {found.version}, and NeMo Gym {gym_version} needs {least} or newer."
        )
    return found


def _is_version(text: str) -> bool:
    return bool(text) and all(part.isdigit() for part in text.split("."))


def _matches(version: str, wanted: str) -> bool:
    parts = wanted.split(".")
    return version.split(".")[: len(parts)] == parts


def _candidates(wanted: str) -> Iterator[Path]:
    """Files that may be the wanted interpreter, best first, each once."""
    series = ".".join(wanted.split(".")[:2])
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    folders += [Path(sys.base_prefix, "bin")]
    for root in _install_folders():
        # Newest first: 3.12.10 before 3.12.9.
        folders += sorted(root.glob(f"*{series}*/bin"), key=lambda path: (len(path.parent.name), path), reverse=True)
    seen = set()
    for name in (f"python{series}", "python3", "python"):
        for folder in folders:
            path = folder / name
            if os.access(path, os.X_OK) and path.is_file() and path.resolve() not in seen:
                seen.add(path.resolve())
                yield path


def _install_folders() -> list[Path]:
    """Where uv and pyenv keep interpreters, one folder each, whether or not they exist."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or data / "uv/python")
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    # A pyenv that lives elsewhere shows itself by its shims.
    shims = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if Path(folder).name == "shims"]
    return list(dict.fromkeys([uv, *(root / "versions" for root in (pyenv, *(folder.parent for folder in shims)))]))


def _probe(path: Path) -> Interpreter | None:
    """Run it and see what it is; None when it does not run or is not CPython."""
    try:
        answer = subprocess.run(
            [path, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=True
        )
        version, implementation, base = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return Interpreter(Path(base), version) if implementation == "cpython" else None
