"""Small checkouts of their own, in which the real scripts set up real environments."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "tiny"
version = "0"
requires-python = ">=3.11"

[project.optional-dependencies]
trl = ["six"]
verl = ["six"]

[dependency-groups]
test = [{test}]
clients = []
check = []

[tool.hatch.build.targets.wheel]
packages = ["tiny"]
"""


@dataclass(frozen=True)
class Checkout:
    root: Path

    def write_pyproject(self, *test_group: str) -> None:
        quoted = ", ".join(f'"{requirement}"' for requirement in test_group)
        (self.root / "pyproject.toml").write_text(PYPROJECT.format(test=quoted))

    def bootstrap(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return self.script("bootstrap.py", *arguments, **environ)

    def script(self, name: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(self.root / "scripts" / name), *arguments],
            cwd=self.root,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """A tiny project with the scripts; none of the settings that the surrounding run was started with."""
    settings = ("GYMLINK_PYTHON", "GYMLINK_INSTALLER", "UV_RESOLUTION", "UV_TORCH_BACKEND", "PYTHONPATH")
    links = ("PIP_FIND_LINKS", "UV_FIND_LINKS")  # a torch that lies there would be installed into each checkout
    for key in (*settings, *links, "TRL_VERSION", "VERL_VERSION", "OPENRLHF_VERSION"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))  # has uv
    root = tmp_path / "checkout"
    shutil.copytree(REPOSITORY / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tiny").mkdir()
    (root / "tiny" / "__init__.py").write_text("")
    checkout = Checkout(root)
    checkout.write_pyproject("iniconfig")
    return checkout


def load_script(name: str) -> ModuleType:
    """Import one of the scripts, which are no package."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def bootstrap() -> ModuleType:
    return load_script("bootstrap")


@pytest.fixture(scope="session")
def suites(bootstrap: ModuleType) -> ModuleType:
    return load_script("suites")
