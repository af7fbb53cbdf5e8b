"""Saves what reaches the loss: with OPENRLHF_ON_CPU_RECORD=<folder>, one file for each micro-batch of a training step.

A file `<role>-<rank>-<step>-<number>.pt` (role "actor" or "critic"; steps count from 1, numbers from 0 within a step)
is read with `torch.load`: a dict of "role", "rank", "step", "number", "experience" (every field of OpenRLHF's
Experience, as it stood when the loss was computed), "given" (what the loss function was called with, by argument) and
"output" (what it returned). Tensors are padded as OpenRLHF pads them; values that are no tensor are plain Python. A
file appears whole or not at all. Nothing that is computed changes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

VARIABLE = "OPENRLHF_ON_CPU_RECORD"


def record_actor(module: Any) -> None:
    """Record the micro-batches of `ActorPPOTrainer` (trainer/ray/ppo_actor.py)."""
    _record(module.ActorPPOTrainer, "actor")


def record_critic(module: Any) -> None:
    """Record the micro-batches of `CriticPPOTrainer` (trainer/ray/ppo_critic.py)."""
    _record(module.CriticPPOTrainer, "critic")


def _record(trainer: type, role: str) -> None:
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    train, train_micro_batch = trainer.ppo_train, trainer.training_step  # type: ignore[attr-defined]
    steps, now = itertools.count(1), {"step": 0, "number": 0}

    @functools.wraps(train)
    def ppo_train(self: Any, *args: Any, **kwargs: Any) -> Any:
        now.update(step=next(steps), number=0)
        return train(self, *args, **kwargs)

    @functools.wraps(train_micro_batch)
    def training_step(self: Any, experience: Any, *args: Any, **kwargs: Any) -> Any:
        def save(loss: Any, given: Any, named: Any, output: Any) -> None:
            arguments = inspect.signature(loss.forward).bind(*given, **named).arguments
            held = {"role": role, "rank": torch.distributed.get_rank(), **now}
            held |= {"experience": _fields(experience), "given": _plain(arguments), "output": _plain(output)}
            _save(Path(folder), held)

        loss = getattr(self, f"{role}_loss_fn")
        hook = loss.register_forward_hook(save, with_kwargs=True)
        try:
            return train_micro_batch(self, experience, *args, **kwargs)
        finally:
            hook.remove()
            now["number"] += 1

    trainer.ppo_train, trainer.training_step = ppo_train, training_step  # type: ignore[attr-defined]


def _fields(experience: Any) -> dict[str, Any]:
    return {field.name: _plain(getattr(experience, field.name)) for field in dataclasses.fields(experience)}


def _save(folder: Path, held: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "{role}-{rank}-{step:04d}-{number:04d}.pt".format_map(held)
    unfinished = file.with_suffix(".part")
    torch.save(held, unfinished)
    unfinished.replace(file)


def _plain(value: Any) -> Any:
    """What `torch.load` reads without any other class: tensors, lists, dicts, numbers and strings."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
