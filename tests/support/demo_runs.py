"""The demo as a person runs it: a program of its own, of which every process can be found, whoever its parent is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from processes import MARK, marked

SUMMARY_KEYS = {
    "framework", "framework_version", "gym_version", "environment", "steps", "rollouts", "failed", "reward_first",
    "reward_last", "prefix_breaks", "tokens_sampled", "tokens_trained", "tokens_dropped", "max_logprob_error",
    "max_prob_error", "mean_logprob_error", "seconds_setup", "seconds_train",
}  # fmt: skip
LIMITS = {"max_logprob_error": 1e-4, "max_prob_error": 1e-4, "mean_logprob_error": 1e-3}


class Demo:
    """One run of the demo, and all the processes that belong to it."""

    def __init__(
        self,
        output: Path,
        steps: int | None = None,
        *,
        framework: str = "trl",
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.output = output
        self._mark = uuid.uuid4().hex
        self._log = (output.parent / "demo.log").open("w+")
        command = [sys.executable, "-m", "gymlink", "demo", "--framework", framework, "--output", str(output)]
        command += ["--steps", str(steps)] if steps else []
        command += ["--", *arguments] if arguments else []
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **(env or {}), MARK: self._mark},
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def text(self) -> str:
        return Path(self._log.name).read_text()

    def wait_for(self, text: str, deadline_s: float = 300) -> None:
        until = time.monotonic() + deadline_s
        while text not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < until, f"{text!r} never came: {self.text()}"
            time.sleep(0.1)

    def checked_summary(self, steps: int) -> dict[str, Any]:
        """`summary.json`, after a look at everything else that the demo leaves."""
        summary: dict[str, Any] = json.loads((self.output / "summary.json").read_text())
        assert set(summary) == SUMMARY_KEYS
        assert summary["steps"] == steps
        assert summary["failed"] == summary["prefix_breaks"] == 0
        errors = {name: summary[name] for name in LIMITS if summary[name] is not None}
        assert errors
        assert all(0 < error <= LIMITS[name] for name, error in errors.items())
        assert summary["tokens_trained"] + summary["tokens_dropped"] == summary["tokens_sampled"] > 0
        logged = [json.loads(line) for line in (self.output / "metrics.jsonl").read_bytes().splitlines()]
        assert [one["step"] for one in logged] == list(range(1, steps + 1))
        rollouts = [json.loads(line) for line in (self.output / "rollouts.jsonl").read_bytes().splitlines()]
        assert len(rollouts) == summary["rollouts"]
        assert sum(rollout["tokens_sampled"] for rollout in rollouts) == summary["tokens_sampled"]
        assert (self.output / "reward.png").stat().st_size > 0
        return summary

    def alive(self) -> list[psutil.Process]:
        return marked(self._mark)

    def assert_nothing_is_left(self, deadline_s: float = 30) -> None:
        until = time.monotonic() + deadline_s
        while left := self.alive():
            assert time.monotonic() < until, [process.cmdline()[:4] for process in left if process.is_running()]
            time.sleep(0.2)

    def close(self) -> None:
        for process in self.alive():
            process.kill()
        self.process.wait()
        self._log.close()
