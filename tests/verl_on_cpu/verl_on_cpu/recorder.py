"""Saves what reaches the loss: with VERL_ON_CPU_RECORD=<folder>, one file for each call of a training loss function.

A file `<role>-<rank>-<number>.pt` (role "actor" or "critic"; numbers count from 0, in order) is read with
`torch.load`: a dict of "role", "rank", "number", "data" (all that is in the TensorDict that the loss was given) and
"output" (what the model computed for it: log_probs or values). Jagged tensors are lists with one tensor per sequence;
values that are no tensor are plain Python. A file appears whole or not at all. Nothing that is computed changes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

VARIABLE = "VERL_ON_CPU_RECORD"
_numbers = {role: itertools.count() for role in ("actor", "critic")}


def recording(loss_function: Callable[..., Any], role: str) -> Callable[..., Any]:
    """The same loss function, which also saves what it is given when VERL_ON_CPU_RECORD names a folder."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return loss_function

    def recorded(*, model_output: Mapping[str, Any], data: Any, dp_group: Any = None) -> Any:
        _save(Path(folder), role, data, model_output)
        return loss_function(model_output=model_output, data=data, dp_group=dp_group)

    return recorded


def _save(folder: Path, role: str, data: Any, output: Mapping[str, Any]) -> None:
    from verl.utils import tensordict_utils

    rank, number = torch.distributed.get_rank(), next(_numbers[role])
    held = {
        "role": role,
        "rank": rank,
        "number": number,
        "data": {key: _plain(tensordict_utils.get(data, key)) for key in data.keys()},  # noqa: SIM118 - a TensorDict
        "output": {key: _plain(value) for key, value in output.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{role}-{rank}-{number:06d}.pt"
    unfinished = file.with_suffix(".part")
    torch.save(held, unfinished)
    unfinished.replace(file)


def _plain(value: Any) -> Any:
    """What `torch.load` reads without any other class: tensors, lists, dicts, numbers and strings."""
    if isinstance(value, torch.Tensor):
        held = value.detach()
        return [row.clone() for row in held.unbind()] if held.is_nested else held.clone()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy
        return _plain(value.tolist())
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
