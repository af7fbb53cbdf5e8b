"""Trainers that the engine on the live model cannot work with are refused, by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType
from trl import GRPOConfig

from gymlink.errors import ConfigError, PluginError
from gymlink_trl.support import check_trainer, sampling_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def trainer(tmp_path: Any, **changes: Any) -> Any:
    """The attributes of a trainer that are looked at."""
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    accelerator = SimpleNamespace(
        distributed_type=changes.pop("distributed_type", DistributedType.NO),
        state=SimpleNamespace(deepspeed_plugin=changes.pop("deepspeed_plugin", None)),
    )
    plain = {
        "args": args,
        "accelerator": accelerator,
        "processing_class": None,
        "train_dataset": range(8),
        "tools": [],
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "max_completion_length": 64,
    }
    return SimpleNamespace(**{**plain, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"distributed_type": DistributedType.FSDP}, "FSDP"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "Megatron"),
        (
            {"distributed_type": DistributedType.DEEPSPEED, "deepspeed_plugin": SimpleNamespace(zero_stage=3)},
            "ZeRO-3.*ZeRO-2",
        ),
        ({"tools": [print]}, "tools"),
    ],
    ids=["fsdp", "megatron", "zero3", "tools"],
)
def test_refused(tmp_path: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(PluginError, match=says):
        check_trainer(trainer(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"distributed_type": DistributedType.MULTI_CPU},
        {"distributed_type": DistributedType.MULTI_GPU},
        {"distributed_type": DistributedType.DEEPSPEED, "deepspeed_plugin": SimpleNamespace(zero_stage=2)},
    ],
    ids=["one", "cpus", "gpus", "zero2"],
)
def test_accepted(tmp_path: Any, changes: dict[str, Any]) -> None:
    check_trainer(trainer(tmp_path, **changes))


@pytest.mark.parametrize("rows", [4, 3])
def test_fewer_rows_than_a_batch_takes_are_refused(tmp_path: Any, rows: int) -> None:
    """TRL would train no step, and say nothing."""
    args = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4,
        steps_per_generation=2,
        num_generations=2,
    )
    asked = trainer(tmp_path, args=args, train_dataset=range(rows))
    if rows == 4:
        check_trainer(asked)
        return
    with pytest.raises(ConfigError, match=r"3 rows.* 4 different.*num_generations"):
        check_trainer(asked)


@pytest.mark.parametrize(("completion", "turn", "limit"), [(64, None, 64), (64, 8, 8), (8, 64, 8), (None, None, None)])
def test_a_turn_is_no_longer_than_the_completion(
    tmp_path: Any, completion: int | None, turn: int | None, limit: int | None
) -> None:
    assert sampling_of(trainer(tmp_path, max_completion_length=completion), turn).max_tokens == limit
