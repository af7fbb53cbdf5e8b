"""Runs a driver of this folder in a Ray of its own. Whatever it leaves is seen by its mark, and ended here."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import pytest

from gymlink.demo import environments_root
from processes import MARK, marked

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Driver:
    """A program of this folder that runs. It writes what it has to tell into `told`, as JSON."""

    process: subprocess.Popen[bytes]
    folder: Path
    mark: str

    @property
    def told(self) -> Any:
        """What it has told, once it has."""
        path, deadline = self.folder / "told.json", time.monotonic() + TIMEOUT_S
        while not path.exists():
            ended = self.process.poll()
            assert ended is None, f"status {ended}: {self.said}"
            assert time.monotonic() < deadline, self.said
            time.sleep(0.2)
        return json.loads(path.read_text())

    @property
    def said(self) -> str:
        return (self.folder / "said.log").read_text(errors="replace")[-6000:]

    def there(self) -> list[psutil.Process]:
        """All processes that came from it and still run."""
        return marked(self.mark)

    def left(self, patience_s: float) -> list[str]:
        """The command lines of those that are still there after `patience_s`."""
        deadline = time.monotonic() + patience_s
        while (there := self.there()) and time.monotonic() < deadline:
            time.sleep(0.3)
        lines = []
        for process in there:
            with contextlib.suppress(psutil.Error):
                lines.append(" ".join(process.cmdline())[:200])
        return lines


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """`drive("name", gym={...})` starts name.py with a gym.yaml of these settings."""
    try:
        version("verl")
    except PackageNotFoundError:
        pytest.skip("verl is not installed")
    drivers: list[Driver] = []
    ray_folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")  # Ray's sockets need a short name

    def start(name: str, *, gym: dict[str, Any]) -> Driver:
        (tmp_path / "gym.yaml").write_text(json.dumps({"gym": gym}))
        mark = uuid.uuid4().hex
        with (tmp_path / "said.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name(f"{name}.py")), str(tmp_path)],
                env={**os.environ, MARK: mark, "RAY_TMPDIR": ray_folder, "RAY_USAGE_STATS_ENABLED": "0"},
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        drivers.append(Driver(process, tmp_path, mark))
        return drivers[-1]

    try:
        yield start
    finally:
        for driver in drivers:
            driver.process.kill()
            driver.process.wait()
            for _ in range(5):  # a process may start another while it is being ended
                there = driver.there()
                for process in there:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                psutil.wait_procs(there, timeout=2)
        shutil.rmtree(ray_folder, ignore_errors=True)


@pytest.fixture
def keypad() -> dict[str, Any]:
    """The settings of a Gym with one environment of two turns."""
    root = environments_root()
    return {"config_paths": [str(root / "resources_servers/keypad/configs/keypad.yaml")], "root": str(root)}
