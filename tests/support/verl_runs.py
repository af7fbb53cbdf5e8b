"""Runs the unmodified `verl.trainer.main_ppo` in a real Gym, and reads what it left: what reached the loss, what was
collected, what was logged, and which processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from gym_rows import EXAM, MIXED, Row, write_gym, write_rows
from processes import GymRun, json_lines, run_program

ON_CPU = Path(__file__).parents[1] / "verl_on_cpu"
LOG = "verl.log"
TIMEOUT_S = 400.0
STEPS = 3
GENERATIONS = 4

VERSIONS = ("min_global_steps", "max_global_steps")

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
class Run(GymRun):
    """A run that has ended, and what reached its loss."""

    @cached_property
    def logged(self) -> list[dict[str, Any]]:
        """What verl logged, by step."""
        return [line["data"] for line in json_lines(self.folder / "metrics.jsonl")]

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
    own = {
        "PYTHONPATH": str(ON_CPU),
        "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",
        "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
        "VERL_ON_CPU_RECORD": str(folder / "loss"),
        "HYDRA_FULL_ERROR": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    ended = run_program(
        ["-m", "verl.trainer.main_ppo", *arguments],
        folder,
        folder / LOG,
        env={**own, **(env or {})},
        timeout_s=TIMEOUT_S,
    )
    print(f"\n{folder}: status {ended.status} after {ended.seconds:.0f} s; {' '.join(overrides)}")
    return Run(folder, LOG, ended)


def _settings(folder: Path, model: Path, rows: Sequence[Row], val_rows: Sequence[Row]) -> list[str]:
    write_gym(folder)
    for name, those in (("train", rows), ("val", val_rows)):
        write_rows(folder / f"{name}.jsonl", those)
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
