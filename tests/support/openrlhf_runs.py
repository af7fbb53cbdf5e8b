"""Runs the unmodified `openrlhf.cli.train_ppo_ray` on the CPU, and reads what it left: what reached the loss, what was
collected, what was said, and which processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from processes import GymRun, run_program

ON_CPU = Path(__file__).parents[1] / "openrlhf_on_cpu"
LOG = "openrlhf.log"
TIMEOUT_S = 500.0
HEADS = 2
"""Of a tiny model's attention: vLLM takes none with fewer than 32 dimensions a head."""
PROMPTS = 4
GENERATIONS = 8

Key = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...] | None]
"""What tells a row from others: its ids, their mask, and the logprobs that they were sampled with."""


@dataclass(frozen=True)
class TrainedRow:
    """A row that reached the actor's loss, without padding; `step` counts from 1.

    `ids` are the whole sequence; the tensors and `mask` are one shorter: the first token is predicted by nothing.
    """

    step: int
    ids: tuple[int, ...]
    mask: torch.Tensor
    rollout_log_probs: torch.Tensor | None
    old_log_probs: torch.Tensor
    advantages: torch.Tensor

    @property
    def key(self) -> Key:
        sampled = self.rollout_log_probs
        logprobs = None if sampled is None else (0.0, *sampled.tolist())
        return self.ids, (0, *self.mask.int().tolist()), logprobs


@dataclass(frozen=True)
class Run(GymRun):
    """A run that has ended, and what reached its loss."""

    @cached_property
    def rows(self) -> list[TrainedRow]:
        """Every row that reached the actor's loss."""
        files = sorted((self.folder / "loss").glob("actor-*.pt"))
        return [row for path in files for row in _rows_of(torch.load(path))]


def _rows_of(held: Mapping[str, Any]) -> Iterator[TrainedRow]:
    experience = held["experience"]
    for at, attended in enumerate(experience["attention_mask"].bool()):
        length = int(attended.sum())
        rest = slice(0, length - 1)
        sampled = experience["rollout_log_probs"]
        yield TrainedRow(
            step=held["step"],
            ids=tuple(experience["sequences"][at][:length].tolist()),
            mask=experience["action_mask"][at][rest].bool(),
            rollout_log_probs=None if sampled is None else sampled[at][rest],
            old_log_probs=experience["action_log_probs"][at][rest],
            advantages=experience["advantages"][at][rest],
        )


def train(
    folder: Path,
    model: Path,
    agent: Path,
    prompts: Path,
    flags: Sequence[str] = (),
    *,
    env: Mapping[str, str] | None = None,
) -> Run:
    """Run OpenRLHF in `folder` to its end, one pass over `prompts`. Flags given here come last, and win."""
    own = {"PYTHONPATH": str(ON_CPU), "OPENRLHF_ON_CPU_RECORD": str(folder / "loss"), "PYTHONUNBUFFERED": "1"}
    arguments = ["-m", "openrlhf.cli.train_ppo_ray", *_flags(folder, model, agent, prompts), *flags]
    ended = run_program(arguments, folder, folder / LOG, env={**own, **(env or {})}, timeout_s=TIMEOUT_S)
    print(f"\n{folder}: status {ended.status} after {ended.seconds:.0f} s; {' '.join(flags)}")
    return Run(folder, LOG, ended)


def _flags(folder: Path, model: Path, agent: Path, prompts: Path) -> list[str]:
    batch = PROMPTS * GENERATIONS
    return [
        f"--actor.model_name_or_path={model}",
        f"--train.agent_func_path={agent}",
        f"--data.prompt_dataset={prompts}",
        "--data.input_key=input",
        "--data.label_key=label",
        "--data.max_len=256",
        "--rollout.max_new_tokens=6",
        f"--rollout.batch_size={PROMPTS}",
        f"--rollout.n_samples_per_prompt={GENERATIONS}",
        f"--rollout.micro_batch_size={batch}",
        f"--train.batch_size={batch}",
        f"--train.micro_batch_size={batch}",
        f"--eval.n_samples_per_prompt={GENERATIONS}",
        "--eval.temperature=1.0",
        "--actor.num_gpus_per_node=1",
        "--actor.adam.lr=1e-3",
        "--actor.lr_scheduler=constant",
        "--algo.kl.init_coef=0",
        "--vllm.num_engines=1",
        "--vllm.enforce_eager",
        "--vllm.gpu_memory_utilization=0.05",
        "--ds.zero_stage=0",
        "--ds.attn_implementation=sdpa",
        "--ds.param_dtype=bf16",
        f"--ckpt.output_dir={folder / 'model'}",
        f"--ckpt.path={folder / 'checkpoints'}",
    ]
