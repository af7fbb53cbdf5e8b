"""Gym rows as verl reads them: through its own loader of datasets, its collation and both of its trainers' batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from omegaconf import OmegaConf
from torch.utils.data import DataLoader
from verl.protocol import DataProto
from verl.trainer.ppo.utils import create_rl_dataset
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn

from gymlink.errors import ConfigError
from gymlink.gym import parse_row
from gymlink_verl import dataset
from gymlink_verl.dataset import GymDataset

Write = Callable[..., str]

V1_READS = {"raw_prompt", "index", "data_source"}
LEGACY_READS = {"raw_prompt", "data_source", "reward_model", "extra_info"}


@pytest.fixture(autouse=True)
def _no_dataset_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_made", set())


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(name: str, agents: Sequence[str | None]) -> str:
        lines = [
            {"responses_create_params": {"input": f"{name} {index}"}}
            | ({"agent_ref": {"name": agent}} if agent else {})
            for index, agent in enumerate(agents)
        ]
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)) + "\n")
        return str(tmp_path / name)

    return to_file


def data_section(composed: Callable[..., Any], train: str | list[str], val: str | list[str]) -> Any:
    config = composed()
    OmegaConf.update(config, "data.train_files", train)
    OmegaConf.update(config, "data.val_files", val)
    return config.data


def test_verl_makes_it_from_its_own_settings(composed: Callable[..., Any], write: Write) -> None:
    data = data_section(composed, write("train", ["door"] * 3), [write("val", ["door"])])
    train = create_rl_dataset(data.train_files, data, None, None, is_train=True)
    val = create_rl_dataset(data.val_files, data, None, None, is_train=False)
    assert isinstance(train, GymDataset)
    assert (len(train), train[0]["gym_split"]) == (3, "train")
    assert (len(val), val[0]["gym_split"]) == (1, "val")


def test_a_sample_has_what_the_trainers_and_the_agent_loop_read(write: Write) -> None:
    sample = GymDataset(write("rows", ["door", "lift"]))[1]
    assert {*sample} >= V1_READS | LEGACY_READS
    assert (sample["index"], sample["data_source"]) == (1, "lift")
    assert sample["raw_prompt"] == [{"role": "user", "content": "rows 1"}]
    assert parse_row(sample["gym_row"].encode(), "a row") == {
        "responses_create_params": {"input": "rows 1"},
        "agent_ref": {"name": "lift"},
    }


def test_a_batch_of_the_legacy_trainer(write: Write) -> None:
    loader = DataLoader(GymDataset(write("rows", ["door"] * 4)), batch_size=4, collate_fn=collate_fn)
    batch = DataProto.from_single_dict(next(iter(loader)))
    assert len(batch) == 4
    assert {*batch.non_tensor_batch} >= LEGACY_READS | {"gym_row", "gym_split", "index"}
    assert batch.batch["dummy_tensor"].shape == (4, 1)
    repeated = batch.repeat(repeat_times=2, interleave=True)
    assert [*repeated.non_tensor_batch["index"]] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_batch_of_the_v1_trainer(write: Write) -> None:
    """`PPOTrainer._fetch_one_gen_batch` (0.9.1), and what `AgentLoopWorkerTQ` reads of it."""
    loader = DataLoader(GymDataset(write("rows", ["door", None])), batch_size=2, collate_fn=collate_fn)
    collated = next(iter(loader))
    collated["uid"] = np.array(["a", "b"], dtype=object)
    batch = tu.get_tensordict(collated)
    assert len(batch) == 2
    assert [orjson.loads(row)["responses_create_params"]["input"] for row in batch["gym_row"]] == ["rows 0", "rows 1"]
    assert list(batch["uid"]) == ["a", "b"]
    assert list(batch["data_source"]) == ["door", "gym"], "a row that names no agent has one, told when Gym runs"
    assert [int(index) for index in batch["index"]] == [0, 1]
    assert len(tu.concat_tensordict([batch, batch])) == 4


def test_several_environments_and_several_files(write: Write) -> None:
    files = [write("one", ["door", "lift"]), write("two", ["stairs"])]
    rows = GymDataset(files)
    assert [rows[at]["data_source"] for at in range(len(rows))] == ["door", "lift", "stairs"]
    assert [rows[at]["index"] for at in range(len(rows))] == [0, 1, 2]


@pytest.mark.parametrize(("max_samples", "expected"), [(-1, 5), (2, 2), (0, 0), (9, 5)])
def test_max_samples_takes_the_first(write: Write, max_samples: int, expected: int) -> None:
    rows = GymDataset(write("rows", ["door"] * 5), max_samples=max_samples)
    assert [rows[at]["index"] for at in range(len(rows))] == list(range(expected))


def test_the_files_tell_which_split_it_is(write: Write) -> None:
    """Whatever the order; also when one of them is made twice."""
    train, val = write("train", ["door"]), write("val", ["door"])
    config = {"train_files": train, "val_files": [val]}
    made = [GymDataset(files, config=config).split for files in (val, train, [train], [val])]
    assert made == ["val", "train", "train", "val"]


def test_the_same_files_for_both_are_told_by_order(write: Write) -> None:
    """verl reads a validation file also when it never validates."""
    rows = write("rows", ["door"])
    config = {"train_files": rows, "val_files": rows}
    assert [GymDataset(rows, config=config).split for _ in range(2)] == ["train", "val"]


def test_a_tilde_is_the_home_folder(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write("rows", ["door"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(GymDataset("~/rows")) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"responses_create_params": {"input": "x"}}\nnonsense\n', r"rows:2: not JSON"),
        ('{"prompt": "x"}\n', r"rows:1: the key 'responses_create_params' is missing"),
        ('{"responses_create_params": {"input": "x"}, "agent_ref": "door"}\n', r"rows:1: 'agent_ref' must be"),
        ("", "no rows"),
    ],
)
def test_a_bad_row_says_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rows").write_text(text)
    with pytest.raises(ConfigError, match=said):
        GymDataset(str(tmp_path / "rows"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read the rows.*nowhere"):
        GymDataset(str(tmp_path / "nowhere"))
