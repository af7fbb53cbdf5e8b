"""Gym rows as a dataset for verl (`data.custom_cls`): each sample carries its whole row, so any node can run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import orjson
import ray
import torch
from torch.utils.data import Dataset

from gymlink.gym import agent_of, read_rows, readable_messages, source_of
from gymlink_verl.job import job_of

Split = Literal["train", "val"]


class GymDataset(Dataset[dict[str, Any]]):
    """The rows of one or several Gym JSONL files, which may belong to several environments.

    verl makes it: `data_files` are its `data.train_files` or `data.val_files`, `config` its `data` section. A sample
    has what verl's trainers ask of one (`raw_prompt`, `index`, `data_source`, `reward_model`, `extra_info`) and what
    the agent loop asks of it: `gym_row`, the row as JSON, and `gym_split`. The data source is the agent's name, so
    validation is told for each environment. `max_samples` takes the first rows; -1 takes all.

    Raises:
        ConfigError: gym.yaml or a file cannot be read or a line is no Gym row.
    """

    def __init__(
        self,
        data_files: str | Sequence[str],
        tokenizer: Any = None,  # noqa: ARG002 - Gym's agents make the messages, and the gateway renders them
        config: Mapping[str, Any] | None = None,
        processor: Any = None,  # noqa: ARG002
        max_samples: int = -1,
    ) -> None:
        files = [data_files] if isinstance(data_files, str) else list(data_files)
        rows = [row for file in files for row in read_rows(Path(file).expanduser())]
        rows = rows if max_samples < 0 else rows[:max_samples]
        self.split = _split(files, config or {})
        self._rows = [orjson.dumps(row) for row in rows]
        if config is not None and ray.is_initialized():
            # Gym starts while the trainer loads the model.
            job_of(config["gymlink"]).expect(set(map(agent_of, rows)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = orjson.loads(self._rows[index])
        source = source_of(row)
        return {
            "gym_row": self._rows[index].decode(),
            "gym_split": self.split,
            "raw_prompt": readable_messages(row),
            "index": index,
            "data_source": source,
            "reward_model": {"style": "gym", "ground_truth": None},
            "extra_info": {"index": index},
            # The legacy trainer cannot make a batch without a tensor.
            "dummy_tensor": torch.tensor([0], dtype=torch.uint8),
        }


_made: set[Split] = set()


def _split(files: Sequence[str], config: Mapping[str, Any]) -> Split:
    """Which of the two this dataset is: verl does not say. It makes the one for training first."""
    validation = config.get("val_files")
    validation = [validation] if isinstance(validation, str) else list(validation or [])
    training = config.get("train_files")
    training = [training] if isinstance(training, str) else list(training or [])
    if files == training != validation:
        split: Split = "train"
    elif files == validation != training:
        split = "val"
    else:
        split = "val" if "train" in _made else "train"
    _made.add(split)
    return split
