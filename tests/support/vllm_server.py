"""A real `vllm serve` on the CPU, with a tiny model, that a test starts, breaks and starts again.

vLLM for the CPU is a distribution of another name, and its command asks for "vllm": a folder on the path holds a
distribution of that name, and nothing else. A server has a session of its own, and whatever it starts is in that: it is
ended with it. (A mark in the environment would not do: vLLM's processes write their titles over theirs.)
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from urllib.request import Request, urlopen

import psutil

START_S = 500.0
"""A start takes about a minute on two cores, several at once take longer, and other work on the machine longer yet."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    "VLLM_SERVER_DEV_MODE": "1",
}
FLAGS = ("--host=127.0.0.1", "--max-num-seqs=64", "--dtype=float32", "--enforce-eager")


class VllmServer:
    """`vllm serve` of the model in a folder, on a port of its own; `folder` gets its log."""

    def __init__(
        self, model: Path, folder: Path, *, flags: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"vllm-{self.port}.log"
        self._command = [
            str(Path(sys.executable).with_name("vllm")),
            "serve",
            str(model),
            "--served-model-name=tiny",
            f"--port={self.port}",
            *FLAGS,
            *flags,
        ]
        self._env = {
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": str(_named_vllm(folder)),
            **(env or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and do not wait."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until it serves; fails with the end of its log."""
        assert self._process is not None
        deadline = time.monotonic() + START_S
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                self._ask("GET", "/health")
            except OSError:
                time.sleep(0.25)
            else:
                return
        raise AssertionError(f"vllm serve did not come up:\n{self.log.read_text(errors='replace')[-4000:]}")

    def ask_to_end(self) -> None:
        """SIGTERM, as an operator or a cluster would."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End all that belongs to it, at once."""
        if self._process is None:
            return
        for _ in range(5):  # a process may start another while it is being ended
            psutil.wait_procs([_killed(process) for process in in_session(self._process.pid)], timeout=5)
        self._process.wait(timeout=10)
        assert not in_session(self._process.pid), "something of vLLM could not be ended"

    def running(self) -> int:
        """How many requests it samples now, by its own account."""
        return self.metric("vllm:num_requests_running")

    def sampled(self) -> int:
        """How many tokens it has sampled since it was started."""
        return self.metric("vllm:generation_tokens_total")

    def metric(self, name: str) -> int:
        lines = self._ask("GET", "/metrics").decode().splitlines()
        return round(sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{")))

    def post(self, path: str) -> None:
        self._ask("POST", path)

    def _ask(self, method: str, path: str) -> bytes:
        with urlopen(Request(self.url + path, method=method), timeout=60) as answer:
            content: bytes = answer.read()
            return content


def in_session(leader: int) -> list[psutil.Process]:
    """The processes of the session that `leader` began; those that have ended and wait for a parent are left out."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _named_vllm(folder: Path) -> Path:
    """A folder for the path in which the CPU build of vLLM has the name that its command looks up."""
    number = version("vllm-cpu").partition("+")[0] + "+cpu"  # by "cpu" in it, vLLM knows its platform
    site = folder / "named-vllm"
    info = site / f"vllm-{number}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
    return site


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _killed(process: psutil.Process) -> psutil.Process:
    with contextlib.suppress(psutil.Error):
        process.kill()
    return process
