"""scripts/bootstrap.py: what it chooses, what it makes, and what it leaves behind."""

from __future__ import annotations

import ast
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from conftest import Checkout

VERSION = sys.version_info[:2]
NAME = f"python{VERSION[0]}.{VERSION[1]}"
MARK = "GYMLINK_TEST_MARK"

# A package that cannot be built in isolation, nor once the rest is there.
PARTICULAR = """\
import importlib.util, os
import iniconfig
from setuptools import setup

assert importlib.util.find_spec("six") is None
with open("particular.py", "w") as module:
    module.write(f"told = {os.environ['PARTICULAR_TOLD']!r}")
setup(name="particular", version="1", py_modules=["particular"])
"""
IN_ORDER = """\
import bootstrap

bootstrap.ENVIRONMENTS["ordered"] = bootstrap.Environment(
    extras=(),
    groups=("test",),
    first=(("setuptools", "wheel", "iniconfig"), ("--no-build-isolation", "./particular")),
    variables=(("PARTICULAR_TOLD", "this"),),
    without=("iniconfig",),
)
bootstrap.guarded(bootstrap.main)
"""


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def link_python(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.realpath(sys.executable))
    return path


def nowhere(folder: Path) -> dict[str, str]:
    """Surroundings in which no interpreter is found."""
    empty = folder / "empty"
    empty.mkdir()
    return {"PATH": str(empty), "PYENV_ROOT": str(empty), "UV_PYTHON_INSTALL_DIR": str(empty)}


class TestPythonChoice:
    def test_a_shim_that_does_not_run_is_passed_over_for_pyenvs_own(
        self, bootstrap: ModuleType, tmp_path: Path
    ) -> None:
        surroundings = nowhere(tmp_path)
        surroundings["PATH"] = str(program(tmp_path / "shims" / NAME, "exit 127").parent)
        surroundings["PYENV_ROOT"] = str(tmp_path / "pyenv")
        python = link_python(tmp_path / "pyenv" / "versions" / "any" / "bin" / NAME)
        assert bootstrap.find_python([(3, 99), VERSION], surroundings) == (str(python), VERSION)

    def test_a_python3_of_the_wanted_version_will_do(self, bootstrap: ModuleType, tmp_path: Path) -> None:
        python = link_python(tmp_path / "bin" / "python3")
        surroundings = {**nowhere(tmp_path), "PATH": str(python.parent)}
        assert bootstrap.find_python([VERSION], surroundings) == (str(python), VERSION)
        assert bootstrap.find_python([(3, 99)], surroundings) is None

    def test_uvs_own_interpreters_are_searched(self, bootstrap: ModuleType, tmp_path: Path) -> None:
        python = link_python(tmp_path / "uv" / f"cpython-{NAME}" / "bin" / NAME)
        surroundings = {**nowhere(tmp_path), "UV_PYTHON_INSTALL_DIR": str(tmp_path / "uv")}
        assert bootstrap.find_python([VERSION], surroundings) == (str(python), VERSION)

    def test_a_local_torch_decides(self, bootstrap: ModuleType, tmp_path: Path) -> None:
        for minor in (11, 12, 13):
            program(tmp_path / "bin" / f"python3.{minor}", f"echo cpython 3 {minor}")
        surroundings = {**nowhere(tmp_path), "PATH": str(tmp_path / "bin")}
        assert bootstrap.choose_python("trl", {}, surroundings)[1] == (3, 12)
        assert bootstrap.choose_python("trl", {(3, 13): "2.13.0"}, surroundings)[1] == (3, 13)
        assert bootstrap.choose_python("trl", {(3, 9): "2.13.0"}, surroundings)[1] == (3, 12)
        asked = {**surroundings, "GYMLINK_PYTHON": "3.11"}
        assert bootstrap.choose_python("trl", {(3, 13): "2.13.0"}, asked)[1] == (3, 11)

    def test_an_environment_takes_only_pythons_that_it_fits(self, bootstrap: ModuleType, tmp_path: Path) -> None:
        newest = program(tmp_path / "bin" / "python3.13", "echo cpython 3 13")
        surroundings = {**nowhere(tmp_path), "PATH": str(tmp_path / "bin")}
        wheels = {(3, 13): "2.13.0", (3, 11): "2.13.0"}
        assert bootstrap.choose_python("trl", wheels, surroundings) == (str(newest), (3, 13))
        assert bootstrap.choose_python("verl", wheels, surroundings) is None
        for minor in (11, 12):
            program(tmp_path / "bin" / f"python3.{minor}", f"echo cpython 3 {minor}")
        assert bootstrap.choose_python("verl", wheels, surroundings)[1] == (3, 11)
        assert bootstrap.choose_python("verl", {(3, 13): "2.13.0"}, surroundings)[1] == (3, 12)

    @pytest.mark.parametrize(
        ("name", "asked", "message"),
        [
            ("trl", "/no/such/python", "does not run"),
            ("trl", "python3.9", "is Python 3.9, and trl needs 3.11 or 3.12 or 3.13"),
            ("trl", "3.9", "is Python 3.9, and trl needs 3.11 or 3.12 or 3.13"),
            ("trl", "3.99", "looked for 3.99"),
            ("verl", "python3.13", "is Python 3.13, and verl needs 3.11 or 3.12"),
            ("verl", "3.13", "is Python 3.13, and verl needs 3.11 or 3.12"),
        ],
    )
    def test_what_was_asked_for_and_cannot_be_is_an_error(
        self, bootstrap: ModuleType, tmp_path: Path, name: str, asked: str, message: str
    ) -> None:
        for minor in (9, 13):
            program(tmp_path / "bin" / f"python3.{minor}", f"echo cpython 3 {minor}")
        by_path = asked.startswith("python")
        surroundings = {
            **nowhere(tmp_path),
            "PATH": str(tmp_path / "bin"),
            "GYMLINK_PYTHON": str(tmp_path / "bin" / asked) if by_path else asked,
        }
        with pytest.raises(bootstrap.BootstrapError, match=message) as caught:
            bootstrap.choose_python(name, {}, surroundings)
        assert caught.value.status == 2

    def test_a_newer_python_than_we_would_choose_is_taken_when_asked_for(
        self, bootstrap: ModuleType, tmp_path: Path
    ) -> None:
        newer = program(tmp_path / "python3.14", "echo cpython 3 14")
        asked = {**nowhere(tmp_path), "GYMLINK_PYTHON": str(newer)}
        assert bootstrap.choose_python("trl", {}, asked) == (str(newer), (3, 14))

    def test_own_environments_are_not_searched(self, bootstrap: ModuleType) -> None:
        own = str(bootstrap.VENVS / "trl" / "bin")
        assert bootstrap.search_path({"PATH": os.pathsep.join([own, "/usr/bin"])}) == "/usr/bin"

    def test_runs_on_python_3_8(self, bootstrap: ModuleType, suites: ModuleType) -> None:
        for script in (bootstrap, suites):
            assert script.__file__ is not None
            ast.parse(Path(script.__file__).read_text(), feature_version=(3, 8))


class TestTorchChoice:
    def test_the_newest_that_fits_this_machine_by_public_version(self, bootstrap: ModuleType, tmp_path: Path) -> None:
        here, elsewhere = platform.machine(), "riscv64"
        for wheel in (
            f"torch-2.9.1+cpu-cp311-cp311-manylinux_2_28_{here}.whl",
            f"torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_{here}.whl",
            f"torch-2.14.0+cpu-cp311-cp311-manylinux_2_28_{elsewhere}.whl",
            f"torch-2.8.0-cp312-cp312-linux_{here}.whl",
            f"torch-2.13.0-cp313-cp313t-manylinux_2_28_{here}.whl",
            "torch-2.13.0-cp313-none-macosx_11_0_arm64.whl",
            f"torchvision-9.9.9-cp311-cp311-manylinux_2_28_{here}.whl",
        ):
            (tmp_path / wheel).touch()
        expected = {(3, 11): "2.13.0", (3, 12): "2.8.0"}
        assert bootstrap.local_torch_wheels([str(tmp_path)]) == expected
        assert bootstrap.local_torch_wheels([f"file://{tmp_path}", "https://example.org/wheels"]) == expected
        assert bootstrap.local_torch_wheels([str(tmp_path / "missing")]) == {}

    @pytest.mark.parametrize(
        ("torch", "local", "expected"),
        [
            ("", "", ([], "auto")),
            ("", "2.13.0", (["torch==2.13.0"], "")),
            ("2.13.0+cpu", "2.13.0", (["torch==2.13.0+cpu"], "")),
            ("2.13.0+cpu", "2.14.0", (["torch==2.13.0+cpu"], "cpu")),
            ("2.13.0+cpu", "", (["torch==2.13.0+cpu"], "cpu")),
        ],
    )
    def test_an_environment_may_take_only_one_torch(
        self, bootstrap: ModuleType, torch: str, local: str, expected: tuple[list[str], str]
    ) -> None:
        assert bootstrap.torch_for(bootstrap.Environment((), (), torch=torch), local) == expected

    @pytest.mark.parametrize(
        ("build", "gpu", "pip", "uv"),
        [
            ("", True, [], []),
            ("auto", False, ["cpu"], ["auto"]),
            ("auto", True, [], ["auto"]),
            ("cpu", True, ["cpu"], ["cpu"]),
        ],
    )
    def test_pytorchs_own_index_is_asked_for_what_is_not_here(
        self,
        bootstrap: ModuleType,
        monkeypatch: pytest.MonkeyPatch,
        *,
        build: str,
        gpu: bool,
        pip: list[str],
        uv: list[str],
    ) -> None:
        monkeypatch.setattr(bootstrap, "pytorch_index_answers", lambda: True)
        monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: gpu)
        stages = bootstrap.Stages(Path("log"), {})
        by_pip = bootstrap.pip_installer("python", Path("venv"), build).install
        by_uv = bootstrap.uv_installer(stages, "uv", "python", Path("venv"), build).install
        assert [part.rpartition("/")[2] for part in by_pip[4:]] == [*("--extra-index-url" for _ in pip), *pip]
        assert by_uv[5:] == [*("--torch-backend" for _ in uv), *uv]

    def test_pips_settings_hold_for_uv_too(self, bootstrap: ModuleType) -> None:
        surroundings = {
            "PIP_FIND_LINKS": "/a /b",
            "UV_FIND_LINKS": "/c,/a",
            "PIP_INDEX_URL": "https://mirror/simple",
            "UV_INDEX": "https://chosen/simple",
            "PIP_EXTRA_INDEX_URL": "https://extra/simple",
            "PYTHONPATH": "/somewhere",
        }
        for_installers = bootstrap.installer_environ(surroundings)
        assert for_installers["UV_FIND_LINKS"] == "/a,/b,/c"
        assert for_installers["PIP_FIND_LINKS"] == "/a /b /c"
        assert for_installers["UV_DEFAULT_INDEX"] == "https://mirror/simple"
        assert for_installers["UV_INDEX"] == "https://chosen/simple"
        assert "PYTHONPATH" not in for_installers

    def test_a_framework_can_be_pinned(self, bootstrap: ModuleType) -> None:
        pins = {"TRL_VERSION": "1.16.0", "VERL_VERSION": "0.9.1", "OPENRLHF_VERSION": "0.11.2"}
        assert bootstrap.requirements("trl", pins)[-1] == "trl==1.16.0"
        assert bootstrap.requirements("verl", pins)[-1] == "verl==0.9.1"
        assert bootstrap.requirements("openrlhf", pins)[-1] == "openrlhf==0.11.2"
        assert "trl==1.16.0" not in bootstrap.requirements("trl", {"TRL_VERSION": ""})
        assert bootstrap.fingerprint("trl", {"TRL_VERSION": "1.16.0"}) != bootstrap.fingerprint("trl", {})
        assert bootstrap.fingerprint("trl", {"VERL_VERSION": "0.9.1"}) == bootstrap.fingerprint("trl", {})


class TestMaking:
    def test_makes_once_and_again_when_something_changed(self, checkout: Checkout) -> None:
        show = "import six, os, sys; print(sys.prefix); print(os.environ['GYMLINK_SETUP_STARTED'])"
        show += "; assert not sys.dont_write_bytecode"
        before = time.time()
        first = checkout.bootstrap("trl", "--", "python", "-c", show, PYTHONDONTWRITEBYTECODE="1")
        assert first.returncode == 0, first.stderr
        prefix, started = first.stdout.split()
        assert prefix == str(checkout.root / ".venvs" / "trl")
        assert before <= float(started) <= time.time()
        assert "install trl's packages" in first.stderr

        began = time.monotonic()
        second = checkout.bootstrap("trl", "--", "python", "-c", "import iniconfig, tiny")
        assert (second.returncode, second.stderr) == (0, "")
        assert time.monotonic() - began < 2

        checkout.write_pyproject("packaging")
        third = checkout.bootstrap("trl", "--", "python", "-c", "import packaging, iniconfig")
        assert third.returncode == 1
        assert "No module named 'iniconfig'" in third.stderr

        (checkout.root / ".venvs" / "trl" / ".gymlink-stamp").unlink()
        (checkout.root / ".venvs" / "trl" / "bin" / "python").unlink()
        fourth = checkout.bootstrap("trl", "--", "python", "-c", "import packaging")
        assert fourth.returncode == 0, fourth.stderr

    def test_a_failed_installation_says_why_and_is_redone(self, checkout: Checkout) -> None:
        checkout.write_pyproject("six==99")
        failed = checkout.bootstrap("trl")
        assert failed.returncode == 1
        assert "six==99" in failed.stderr
        assert str(checkout.root / ".venvs" / "trl.log") in failed.stderr
        checkout.write_pyproject()
        mended = checkout.bootstrap("trl", "--", "python", "-c", "import six")
        assert mended.returncode == 0, mended.stderr

    @pytest.mark.parametrize("installer", ["uv", pytest.param("pip", marks=pytest.mark.slow)])
    def test_first_things_first_and_what_is_in_the_way_last(self, checkout: Checkout, installer: str) -> None:
        checkout.write_pyproject("six")
        (checkout.root / "particular").mkdir()
        (checkout.root / "particular" / "setup.py").write_text(PARTICULAR)
        (checkout.root / "scripts" / "in_order.py").write_text(IN_ORDER)
        show = "import particular, six, importlib.util; print(particular.told, importlib.util.find_spec('iniconfig'))"
        made = checkout.script("in_order.py", "ordered", "--", "python", "-c", show, GYMLINK_INSTALLER=installer)
        assert made.returncode == 0, made.stderr
        assert made.stdout.split() == ["this", "None"]

    def test_two_at_once_install_once(self, checkout: Checkout) -> None:
        command = [sys.executable, str(checkout.root / "scripts" / "bootstrap.py"), "trl", "--", "python", "-c", ""]
        both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        said = [process.communicate(timeout=300)[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        assert sum("packages with uv (" in text for text in said) == 1
        assert sum("waiting for another set-up" in text for text in said) == 1

    @pytest.mark.parametrize(("name", "pythons"), [("trl", "3.12 or 3.11 or 3.13"), ("verl", "3.12 or 3.11")])
    def test_without_a_python_it_says_where_it_looked(
        self, checkout: Checkout, tmp_path: Path, name: str, pythons: str
    ) -> None:
        surroundings = {**nowhere(tmp_path), "UV_PYTHON_DOWNLOADS": "never"}
        answer = checkout.bootstrap(name, "--", "true", **surroundings)
        assert answer.returncode == 2
        assert f"looked for {pythons} in" in answer.stderr
        for searched in surroundings["PATH"], surroundings["PYENV_ROOT"], "GYMLINK_PYTHON=":
            assert searched in answer.stderr
        assert "Traceback" not in answer.stderr
        assert not (checkout.root / ".venvs" / name).exists()

    @pytest.mark.parametrize(
        ("arguments", "surroundings", "message"),
        [
            ((), {}, "usage: "),
            (("verl2",), {}, "No environment is called 'verl2'; known: openrlhf, trl, verl"),
            (("trl",), {"GYMLINK_INSTALLER": "conda"}, "expected 'uv' or 'pip'"),
        ],
    )
    def test_wrong_use_is_status_2(
        self, checkout: Checkout, arguments: tuple[str, ...], surroundings: dict[str, str], message: str
    ) -> None:
        answer = checkout.bootstrap(*arguments, **surroundings)
        assert answer.returncode == 2
        assert message in answer.stderr
        assert "Traceback" not in answer.stderr

    def test_a_command_that_does_not_exist_is_status_2(self, checkout: Checkout) -> None:
        answer = checkout.bootstrap("trl", "--", "no-such-command")
        assert answer.returncode == 2
        assert "no-such-command" in answer.stderr

    @pytest.mark.slow
    def test_without_uv_on_path_it_gets_a_private_one(self, checkout: Checkout, tmp_path: Path) -> None:
        python = link_python(tmp_path / "bin" / NAME)
        answer = checkout.bootstrap("trl", "--", "python", "-c", "import six", PATH=str(python.parent))
        assert answer.returncode == 0, answer.stderr
        assert "install uv into .tools/uv" in answer.stderr
        assert (checkout.root / ".tools" / "uv" / "bin" / "uv").exists()

    @pytest.mark.slow
    def test_where_uv_cannot_be_had_venv_and_pip_do(self, checkout: Checkout, tmp_path: Path) -> None:
        (checkout.root / ".tools").write_text("in the way of a private uv")
        python = link_python(tmp_path / "bin" / NAME)
        answer = checkout.bootstrap("trl", "--", "python", "-c", "import six, iniconfig", PATH=str(python.parent))
        assert answer.returncode == 0, answer.stderr
        assert "install trl's packages with pip" in answer.stderr


def marked_processes(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    """Marks the processes of one test; ends what the test left behind, after it was judged."""
    yield str(tmp_path)
    for process in marked_processes(str(tmp_path)):
        process.kill()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's word on a parent's end is Linux's own")
class TestEnding:
    @pytest.fixture
    def slow_uv(self, tmp_path: Path) -> str:
        """PATH with a uv that starts a builder of its own and never ends."""
        uv = 'if [ "$1" = --version ]; then echo "uv 99.0"; else sleep 600 & sleep 600; fi'
        return f"{program(tmp_path / 'slow' / 'uv', uv).parent}{os.pathsep}{os.environ['PATH']}"

    def start(self, checkout: Checkout, mark: str, path: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start as make would: below a parent that is not this process."""
        script = checkout.root / "scripts" / "bootstrap.py"
        inner = f'"{sys.executable}" "{script}" --parent $$ trl {" ".join(arguments)}; exit $?'
        surroundings = {**os.environ, MARK: mark, "PATH": path}
        return subprocess.Popen(["sh", "-c", inner], env=surroundings, stderr=subprocess.DEVNULL)

    def test_killing_the_parent_ends_an_installation(self, checkout: Checkout, mark: str, slow_uv: str) -> None:
        parent = self.start(checkout, mark, slow_uv)
        # the parent, the bootstrap, its guard, uv, and two that sleep
        assert wait_for(lambda: len(marked_processes(mark)) == 6), marked_processes(mark)
        parent.kill()
        parent.wait()
        assert wait_for(lambda: not marked_processes(mark)), marked_processes(mark)

    def test_killing_the_bootstrap_ends_an_installation(self, checkout: Checkout, mark: str, slow_uv: str) -> None:
        parent = self.start(checkout, mark, slow_uv)
        assert wait_for(lambda: len(marked_processes(mark)) == 6), marked_processes(mark)
        [bootstrap] = psutil.Process(parent.pid).children()
        bootstrap.kill()
        assert parent.wait(timeout=20) == 128 + signal.SIGKILL
        assert wait_for(lambda: not marked_processes(mark)), marked_processes(mark)

    def test_ctrl_c_ends_an_installation(self, checkout: Checkout, mark: str, slow_uv: str) -> None:
        parent = self.start(checkout, mark, slow_uv)
        assert wait_for(lambda: len(marked_processes(mark)) == 6), marked_processes(mark)
        [bootstrap] = psutil.Process(parent.pid).children()
        bootstrap.send_signal(signal.SIGINT)
        assert parent.wait(timeout=20) == 128 + signal.SIGINT
        assert wait_for(lambda: not marked_processes(mark)), marked_processes(mark)

    def test_killing_the_parent_ends_the_command(self, checkout: Checkout, mark: str) -> None:
        assert checkout.bootstrap("trl").returncode == 0
        parent = self.start(checkout, mark, os.environ["PATH"], "--", "sleep", "600")
        assert wait_for(lambda: any("600" in p.cmdline() for p in psutil.Process(parent.pid).children()))
        parent.kill()
        parent.wait()
        assert wait_for(lambda: not marked_processes(mark)), marked_processes(mark)
