"""What `GymRollout` takes from a GRPOTrainer, and which trainers it cannot work with.

Only public attributes of TRL, transformers and accelerate are used; `tests/plugins/trl/test_contract.py` names them.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType, gather_object
from transformers import PreTrainedModel, ProcessorMixin

from gymlink.errors import ConfigError, PluginError
from gymlink.session import Peers
from gymlink.types import Sampling

if TYPE_CHECKING:
    from trl import GRPOConfig, GRPOTrainer

ZERO_3 = 3


def check_arguments(args: GRPOConfig) -> None:
    """One clear error for a setting that cannot work, before a trainer is made.

    Raises:
        PluginError: says which setting, why, and what to set instead.
    """
    _refuse(
        {
            "use_vllm=True (this version samples from the trainer's live model); set use_vllm: false": args.use_vllm,
            f"repetition_penalty={args.repetition_penalty!r}; set it to 1.0": args.repetition_penalty != 1.0,
            f"generation_kwargs={args.generation_kwargs!r}; use temperature, top_p, top_k and min_p": bool(
                args.generation_kwargs
            ),
            f"chat_template_kwargs={args.chat_template_kwargs!r}; set them in the rows": bool(
                args.chat_template_kwargs
            ),
        }
    )


def check_row_count(rows: int, args: GRPOConfig) -> None:
    """TRL's sampler leaves an incomplete batch out: with too few rows it trains no step, and says nothing.

    Raises:
        ConfigError: fewer `rows` than one batch of rollouts takes different prompts.
    """
    prompts = args.generation_batch_size // args.num_generations
    if rows < prompts:
        raise ConfigError(
            f"The training data has {rows} rows, and one batch of rollouts takes {prompts} different ones "
            f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}): TRL would "
            "train no step. Add rows, raise num_generations, or lower generation_batch_size: "
            "per_device_train_batch_size, steps_per_generation (gradient_accumulation_steps by default), or the "
            "number of processes."
        )


def check_trainer(trainer: GRPOTrainer) -> None:
    """One clear error for a trainer that cannot work, before Gym starts.

    Raises:
        PluginError: as `check_arguments`. ConfigError: as `check_row_count`.
    """
    check_arguments(trainer.args)
    if isinstance(trainer.train_dataset, Sized):
        check_row_count(len(trainer.train_dataset), trainer.args)
    distributed = DistributedType(trainer.accelerator.distributed_type)
    deepspeed = trainer.accelerator.state.deepspeed_plugin
    spread = "its weights are spread over the processes, and each samples from all of them"
    _refuse(
        {
            f"DeepSpeed ZeRO-3 ({spread}); use ZeRO-2 or plain data parallelism": (
                deepspeed is not None and deepspeed.zero_stage == ZERO_3
            ),
            f"FSDP ({spread}); use plain data parallelism": distributed is DistributedType.FSDP,
            f"Megatron-LM ({spread}); use plain data parallelism": distributed is DistributedType.MEGATRON_LM,
            "a multimodal model; pass a tokenizer as processing_class": isinstance(
                trainer.processing_class, ProcessorMixin
            ),
            "tools or an environment_factory (Gym's agents run the tools); leave both out": bool(trainer.tools),
        }
    )


def _refuse(cases: Mapping[str, bool]) -> None:
    for what, refused in cases.items():
        if refused:
            raise PluginError(f"GymRollout does not work with {what}.")


def sampling_of(trainer: GRPOTrainer, max_turn_tokens: int | None = None) -> Sampling:
    """How the trainer samples, and how much in one turn: no more than the whole completion may have."""
    limits = [limit for limit in (max_turn_tokens, trainer.max_completion_length) if limit is not None]
    return Sampling(
        temperature=float(trainer.temperature),
        top_p=float(trainer.top_p),
        top_k=int(trainer.top_k or 0),
        min_p=float(trainer.min_p or 0.0),
        max_tokens=min(limits, default=None),
    )


def batching_model(trainer: GRPOTrainer) -> PreTrainedModel:
    """The transformers model inside what accelerate, torch.compile and PEFT put around it."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner


def peers_of(trainer: GRPOTrainer) -> Peers | None:
    """The job's other processes, or None when there is one process."""
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1:
        return None
    return Peers(
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        exchange=lambda value: list(gather_object([value])),
    )


def freeze_garbage() -> None:
    """Take what is in memory now out of garbage collection: for a process that ends with its training.

    transformers collects garbage whenever sampling ends; with torch and a trainer loaded that is half a second each
    time, for objects that all stay.
    """
    gc.collect()
    gc.freeze()
