"""Runs the unmodified `verl.trainer.main_ppo` in a real Gym, and reads what it left: what reached the loss, what was
collected, what was logged, and which processes.

It is started without a guard, so that what it leaves behind is seen; then that is ended here, whatever happens.
"""

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from processes import MARK, marked

ENVIRONMENTS = Path(__file__).parents[1] / "plugins" / "verl" / "environments"
ON_CPU = Path(__file__).parents[1] / "verl_on_cpu"
PATIENCE_S = 20.0
"""How long what a run started may outlast it."""
RUN_TIMEOUT_S = 400.0
STEPS = 3
GENERATIONS = 4

VERSIONS = ("min_global_steps", "max_global_steps")

Row = dict[str, Any]
Key = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[float, ...]]


@dataclass(frozen=True)
class TrainedRow:
    """A row that reached the loss, without padding. Tensors are as long as the response; `step` counts from 1."""

    step: int
    group: str
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    mask: torch.Tensor
    rollout_log_probs: torch.Tensor
    old_log_probs: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    versions: tuple[int, int]
    values: torch.Tensor | None = None
    routed_experts: torch.Tensor | None = None

    @property
    def is_trained(self) -> bool:
        return bool(self.mask.any())

    @property
    def key(self) -> Key:
        """What tells a row from every other: ids, mask, and the logprobs that the ids were sampled with."""
        return self.prompt, self.response, tuple(self.mask.int().tolist()), tuple(self.rollout_log_probs.tolist())


@dataclass(frozen=True)
class Run:
    """A run that has ended. `left` names the processes that were still there `PATIENCE_S` later."""

    folder: Path
    status: int
    seconds: float
    left: tuple[str, ...]

    @cached_property
    def said(self) -> str:
        return (self.folder / "verl.log").read_text(errors="replace")

    @cached_property
    def error(self) -> str | None:
        """Why gymlink stopped the run."""
        path = self.folder / "gym" / "error.txt"
        return path.read_text() if path.exists() else None

    @cached_property
    def rollouts(self) -> list[dict[str, Any]]:
        """What was collected, validation too, in the order in which it ended."""
        path = self.folder / "gym" / "rollouts.jsonl"
        return _json_lines(path) if path.exists() else []

    @cached_property
    def logged(self) -> list[dict[str, Any]]:
        """What verl logged, by step."""
        return [line["data"] for line in _json_lines(self.folder / "metrics.jsonl")]

    @cached_property
    def rows(self) -> list[TrainedRow]:
        """Every row that reached the actor's loss."""
        return self._rows("actor")

    @cached_property
    def critic_rows(self) -> list[TrainedRow]:
        """Every row that reached the critic's loss."""
        return self._rows("critic")

    def _rows(self, role: str) -> list[TrainedRow]:
        rows, step = [], 1
        for path in sorted((self.folder / "loss").glob(f"{role}-*.pt")):
            data = torch.load(path)["data"]
            rows += [_row_of(data, at, step) for at in range(len(data["responses"]))]
            step += data["update_lr_scheduler"]  # True in the last mini-batch of a step
        return rows


def _row_of(data: Mapping[str, Any], at: int, step: int) -> TrainedRow:
    """V1's rows have any length; the legacy trainer pads prompts on the left and responses on the right."""
    own = data["extra_fields"][at] if "extra_fields" in data else {key: data[key][at] for key in VERSIONS}
    prompt, response = data["prompts"][at], slice(None)
    if "attention_mask" in data:
        real = data["attention_mask"][at].bool()
        prompt, response = prompt[real[: len(prompt)]], real[len(prompt) :]
    floats = {
        name: data[name][at][response]
        for name in ("rollout_log_probs", "old_log_probs", "advantages", "returns", "values")
        if name in data
    }
    return TrainedRow(
        step=step,
        group=data["uid"][at],
        prompt=tuple(prompt.tolist()),
        response=tuple(data["responses"][at][response].tolist()),
        mask=data["response_mask"][at][response].bool(),
        versions=(own[VERSIONS[0]], own[VERSIONS[1]]),
        routed_experts=data["routed_experts"][at] if "routed_experts" in data else None,
        **floats,
    )


def _json_lines(path: Path) -> list[dict[str, Any]]:
    with path.open() as lines:  # str.splitlines would also split at characters that JSON leaves as they are
        return [json.loads(line) for line in lines]


def forgetful(number: int, forget_every: int, *, name: str = "story") -> Row:
    return _row("forgetful_agent", f"{name} {number}", forget_every=forget_every, bonus=number / 10)


def flaky(number: int, fail_every: int, *, name: str = "visit") -> Row:
    return _row("flaky_agent", f"{name} {number}", fail_every=fail_every, bonus=number / 10)


def _row(agent: str, text: str, **fields: Any) -> Row:
    content = [{"role": "user", "content": text}]
    return {"responses_create_params": {"input": content}, "agent_ref": {"name": agent}, **fields}


MIXED = [
    row
    for number in range(8)
    for row in (forgetful(number, 2), flaky(number, 5), forgetful(number, 1), flaky(number, 5))
]
"""Rows of which every four give groups with all rollouts scored, with failed ones, and with rewritten ones."""
EXAM = [forgetful(1, 1, name="exam"), flaky(1, 2, name="exam"), flaky(2, 2, name="exam"), forgetful(2, 0, name="exam")]


def train(
    folder: Path,
    model: Path,
    overrides: Sequence[str],
    *,
    rows: Sequence[Row] = MIXED,
    val_rows: Sequence[Row] = EXAM,
    env: Mapping[str, str] | None = None,
) -> Run:
    """Run verl in `folder` to its end, with these Hydra overrides."""
    arguments = [*_settings(folder, model, rows, val_rows), *overrides]
    with _marked_environment(folder, env or {}) as environment:
        started = time.monotonic()
        status = _run(arguments, folder, environment)
        seconds = time.monotonic() - started
        left = _wait_for_the_end(environment[MARK])
    print(f"\n{folder}: status {status} after {seconds:.0f} s; {' '.join(overrides)}")
    return Run(folder, status, seconds, left)


def _settings(folder: Path, model: Path, rows: Sequence[Row], val_rows: Sequence[Row]) -> list[str]:
    configs = ["resources_servers/flaky/configs/flaky.yaml", "responses_api_agents/forgetful/configs/forgetful.yaml"]
    gym = {"config_paths": [str(ENVIRONMENTS / config) for config in configs], "root": str(ENVIRONMENTS)}
    (folder / "gym.yaml").write_text(yaml.safe_dump({"gym": gym}))
    for name, those in (("train", rows), ("val", val_rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in those))
    return [
        "+gymlink=gym",
        "+verl_on_cpu=on",
        f"gymlink.gym_config={folder}/gym.yaml",
        f"gymlink.run_dir={folder}/gym",
        "gymlink.max_turn_tokens=6",
        f"actor_rollout_ref.model.path={model}",
        f"actor_rollout_ref.rollout.n={GENERATIONS}",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "algorithm.adv_estimator=grpo",
        f"data.train_files={folder}/train.jsonl",
        f"data.val_files={folder}/val.jsonl",
        "data.shuffle=False",
        "data.max_prompt_length=64",
        "data.max_response_length=128",
        "trainer.logger=[console,file]",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        "trainer.total_epochs=1000",
        f"trainer.total_training_steps={STEPS}",
        f"trainer.default_local_dir={folder}/checkpoints",
        f"hydra.run.dir={folder}/hydra",
    ]


@contextlib.contextmanager
def _marked_environment(folder: Path, more: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """An environment for a run; when it is left, all that carries its mark is ended."""
    mark = uuid.uuid4().hex
    ray_folder = tempfile.mkdtemp(prefix="r-modes-", dir="/tmp")  # Ray's sockets need a short name
    try:
        yield {
            **os.environ,
            MARK: mark,
            "RAY_TMPDIR": ray_folder,
            "PYTHONPATH": str(ON_CPU),
            "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",
            "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
            "VERL_ON_CPU_RECORD": str(folder / "loss"),
            "HYDRA_FULL_ERROR": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **more,
        }
    finally:
        for _ in range(5):  # a process may start another while it is being ended
            psutil.wait_procs(list(map(_killed, marked(mark))), timeout=2)
        shutil.rmtree(ray_folder, ignore_errors=True)


def _run(arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> int:
    with (folder / "verl.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "verl.trainer.main_ppo", *arguments],
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(RUN_TIMEOUT_S)
        finally:
            process.kill()
            process.wait()


def _wait_for_the_end(mark: str) -> tuple[str, ...]:
    """The names of a run's processes that do not end."""
    deadline = time.monotonic() + PATIENCE_S
    while (there := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return tuple(_name(process) for process in there)


def _killed(process: psutil.Process) -> psutil.Process:
    with contextlib.suppress(psutil.Error):
        process.kill()
    return process


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:200]
    except psutil.Error:
        return "?"
