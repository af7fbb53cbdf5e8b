"""Makes and keeps the Python environments of NeMo Gym: one for Gym itself, others only for servers that need more.

An environment is made once, under a lock that holds between processes, and stamped when it is whole; what has no stamp
was left half-made and is made anew. Finding a stamped one takes milliseconds.

Gym could make its servers' environments by itself, and gymlink does not let it, for three reasons seen in Gym 0.4.0: it
makes one of 1.1 GB for every server, all at once, inside the working directory, though most need nothing but nemo-gym;
it downloads through a cache of its own; and with a log folder set it runs
`(echo nemo-gym && grep -v ../.. requirements.txt) | uv pip install` under `set -o pipefail`, which fails without a word
when requirements.txt names nothing else.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from uv import find_uv_bin

from gymlink.config import GymSettings
from gymlink.errors import ConfigError, GymError
from gymlink.gym.guard import GuardedProcess
from gymlink.gym.interpreter import Interpreter, find_interpreter

Report = Callable[[str], None]
"""Takes one line that says what is being done; called again, with the seconds so far, while it lasts."""

REPORT_EVERY_S = 2.0
LAST_LINES = 30
_STAMP = "gymlink.json"
# Every server imports these at the same time, 8 s of compiling each; compiling all 18000 files would take minutes.
_WARM_UP = "import nemo_gym.cli.env, nemo_gym.base_resources_server, ray.dashboard.dashboard, ray.dashboard.agent"
_NAMED_FILE = re.compile(r"^(-r|-c|--requirement|--constraint)[ =]*(\S+)$")
_PYTHON_STATE = re.compile(
    r"VIRTUAL_ENV.*|PYTHON(PATH|HOME|STARTUP|SAFEPATH|DONTWRITEBYTECODE)|_?CONDA_.*|RAY_.*|NEMO_GYM_.*"
)


@dataclass(frozen=True, slots=True)
class GymEnvironment:
    """A virtual environment with nemo-gym in it."""

    prefix: Path
    version: str
    interpreter: Interpreter

    @property
    def python(self) -> Path:
        return self.prefix / "bin" / "python"


@dataclass(frozen=True, slots=True)
class ServerFolder:
    """Where one server's code is; `kind` is "resources_servers" and the like, `name` the folder in it."""

    kind: str
    name: str
    path: Path


def cache_folder() -> Path:
    """`$GYMLINK_HOME`, else gymlink's folder in the user's cache."""
    if home := os.environ.get("GYMLINK_HOME"):
        return Path(home).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "gymlink"


def clean_environment(*, first_on_path: Sequence[Path] = ()) -> dict[str, str]:
    """This process's environment without what would tie a child to this Python, this Ray or this Gym.

    pip's settings for where packages come from are handed to uv, unless uv has its own.
    """
    env = {key: value for key, value in os.environ.items() if not _PYTHON_STATE.fullmatch(key)}
    env["PATH"] = os.pathsep.join([*map(str, first_on_path), env.get("PATH", os.defpath)])
    for pip, uv, older, separator in (
        ("PIP_FIND_LINKS", "UV_FIND_LINKS", "", ","),
        ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL", " "),
        ("PIP_EXTRA_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", " "),
        ("PIP_CERT", "SSL_CERT_FILE", "", " "),
    ):
        if env.get(pip) and not env.get(uv) and not env.get(older):
            env[uv] = separator.join(env[pip].split())
    return env


def prepare_gym(settings: GymSettings, report: Report) -> GymEnvironment:
    """The environment that `settings` ask for: the given one, else gymlink's own, made when it is not there.

    Raises:
        ConfigError: no interpreter fits, or the given environment cannot be used.
        GymError: it could not be made; says what uv said.
    """
    if settings.venv is not None:
        return _given(settings.venv)
    name = f"nemo-gym-{settings.version}"
    if settings.python is not None:
        name += "-" + _digest(settings.python)

    def make(prefix: Path) -> dict[str, str]:
        interpreter = find_interpreter(settings.python, settings.version)
        _make(
            prefix, interpreter, [f"nemo-gym=={settings.version}"], label=f"NeMo Gym {settings.version}", report=report
        )
        return {"path": str(interpreter.path), "version": interpreter.version}

    prefix = cache_folder() / "gym" / name
    made = _once(prefix, make, report)
    return GymEnvironment(prefix, settings.version, Interpreter(Path(made["path"]), made["version"]))


def prepare_server(gym: GymEnvironment, folder: ServerFolder, pins: Sequence[str], report: Report) -> Path:
    """The environment for one server: Gym's own when the server asks for nothing more, else one of its own.

    Args:
        gym: the environment of Gym itself.
        folder: where the server is.
        pins: requirements in which every server must agree with Gym (ray and openai, exactly).
        report: told what is being made.

    Raises:
        GymError: it could not be made; says what uv said.
    """
    asked = _requirements(folder.path)
    if not asked:
        return gym.prefix
    content = "\n".join([gym.version, gym.interpreter.version, *pins, *asked])
    prefix = cache_folder() / "servers" / f"{folder.name}-{_digest(content)}"

    def make(prefix: Path) -> dict[str, str]:
        needs = [f"nemo-gym=={gym.version}", *pins, *asked]
        _make(prefix, gym.interpreter, needs, label=f"what {folder.name} needs", report=report, folder=folder.path)
        return {"path": str(gym.interpreter.path), "version": gym.interpreter.version}

    _once(prefix, make, report)
    return prefix


def last_lines(path: Path, count: int = LAST_LINES) -> str:
    """The end of a log, for a message."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join(lines[-count:]) or "(the log is empty)"


def _given(prefix: Path) -> GymEnvironment:
    python = prefix / "bin" / "python"
    if not (prefix / "bin" / "activate").exists() or not python.exists():
        raise ConfigError(f"gym.venv: {str(prefix)!r} is not a virtual environment (bin/python and bin/activate).")
    probe = (
        "import json, platform, sys\nfrom importlib.metadata import version\n"
        "print(json.dumps([version('nemo-gym'), sys._base_executable, platform.python_version()]))"
    )
    answer = subprocess.run(
        [python, "-I", "-c", probe], capture_output=True, text=True, check=False, env=clean_environment()
    )
    if answer.returncode != 0:
        raise ConfigError(
            f"gym.venv: nemo-gym is not installed in {str(prefix)!r}. Install it there "
            f"(`uv pip install --python {python} nemo-gym`), or leave gym.venv out to have one made."
        )
    gym_version, base, python_version = json.loads(answer.stdout)
    return GymEnvironment(prefix, gym_version, Interpreter(Path(base), python_version))


def _requirements(folder: Path) -> list[str]:
    """What a server asks for besides nemo-gym, as lines of a requirements file.

    Raises:
        ConfigError: there is neither a requirements.txt nor a pyproject.toml.
    """
    if (pyproject := folder / "pyproject.toml").exists():
        lines = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {}).get("dependencies", [])
    elif (requirements := folder / "requirements.txt").exists():
        lines = requirements.read_text(encoding="utf-8").splitlines()
    else:
        raise ConfigError(
            f"{folder} has neither requirements.txt nor pyproject.toml: Gym needs one in the folder of a server. "
            f"A server that needs nothing but Gym has the line 'nemo-gym' in requirements.txt."
        )
    stripped = (line.strip() for line in lines)
    asked = [line for line in stripped if line and not line.startswith("#") and not _is_gym(line)]
    # A file that is named in a requirements file is meant relative to it, and ours lies elsewhere.
    return [_NAMED_FILE.sub(lambda match: f"{match[1]} {folder / match[2]}", line) for line in asked]


def _is_gym(line: str) -> bool:
    # As Gym itself does: a path two folders up is Gym's own checkout.
    if "../.." in line:
        return True
    try:
        return Requirement(line).name.lower().replace("_", "-") == "nemo-gym"
    except InvalidRequirement:
        return False


def _once(prefix: Path, make: Callable[[Path], dict[str, str]], report: Report) -> dict[str, str]:
    """What `make` returned when it made `prefix`, now or earlier; one process at a time."""
    stamp = prefix / _STAMP
    if (made := _read_stamp(stamp, prefix)) is not None:
        return made
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with _lock(prefix.with_name(prefix.name + ".lock"), report):
        if (made := _read_stamp(stamp, prefix)) is not None:
            return made
        shutil.rmtree(prefix, ignore_errors=True)
        made = make(prefix)
        stamp.write_text(json.dumps(made), encoding="utf-8")
        return made


def _read_stamp(stamp: Path, prefix: Path) -> dict[str, str] | None:
    try:
        made: dict[str, str] = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # The interpreter is a link, broken when its Python was removed since.
    return made if (prefix / "bin" / "python").exists() else None


@contextmanager
def _lock(path: Path, report: Report) -> Iterator[None]:
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process that makes {path.stem}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(
    prefix: Path,
    interpreter: Interpreter,
    needs: Sequence[str],
    *,
    label: str,
    report: Report,
    folder: Path | None = None,
) -> None:
    """A new environment at `prefix`; relative paths in `needs` are relative to `folder`."""
    uv = find_uv_bin()
    asked = prefix.with_name(prefix.name + ".in")
    asked.write_text("\n".join(needs) + "\n", encoding="utf-8")
    commands = [
        [uv, "venv", "--no-project", "--seed", "--python", str(interpreter.path), str(prefix)],
        [uv, "pip", "install", "--python", str(prefix / "bin/python"), "--requirement", str(asked)],
        [str(prefix / "bin/python"), "-P", "-c", _WARM_UP],
    ]
    log = prefix.with_name(prefix.name + ".log")
    log.unlink(missing_ok=True)
    for command in commands:
        status = _run(command, log, f"installing {label}", report, folder or prefix.parent)
        if status != 0:
            raise GymError(
                f"Could not install {label} for Python {interpreter.version} (status {status}; the whole log is "
                f"{log}):\n{last_lines(log)}"
            )
    asked.unlink()


def _run(command: Sequence[str], log: Path, what: str, report: Report, cwd: Path) -> int:
    started = time.monotonic()
    with log.open("ab") as output:
        process = GuardedProcess(command, env=clean_environment(), cwd=cwd, output=output)
        try:
            while (status := process.wait(REPORT_EVERY_S)) is None:
                report(f"{what} ({time.monotonic() - started:.0f} s)")
        finally:
            process.stop()
    return status


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
