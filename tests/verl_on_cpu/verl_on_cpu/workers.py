"""What a training worker needs: a gloo process group, and FSDP engines registered for the device "cpu"."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from verl_on_cpu.device import NAME
from verl_on_cpu.recorder import recording


@functools.cache
def prepare() -> None:
    """In a process that verl started as a worker: make the process group and register the engines, once."""
    if os.environ.get("WG_BACKEND") != "ray":
        return
    if not dist.is_initialized():
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", os.environ["DIST_INIT_METHOD"], rank=rank, world_size=size)
    _register_engines()


def _register_engines() -> None:
    from transformers import AutoModelForTokenClassification
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

    class Recorded:
        """An engine whose loss function is recorded while it trains."""

        role: str

        def forward_backward_batch(
            self, data: Any, loss_function: Callable[..., Any], forward_only: bool = False
        ) -> Any:
            loss = loss_function if forward_only else recording(loss_function, self.role)
            return super().forward_backward_batch(data, loss, forward_only=forward_only)  # type: ignore[misc]

    @EngineRegistry.register(model_type="language_model", backend="fsdp2", device=NAME)
    class CpuActorEngine(Recorded, FSDPEngineWithLMHead):
        role = "actor"

    @EngineRegistry.register(model_type="value_model", backend="fsdp2", device=NAME)
    class CpuCriticEngine(Recorded, FSDPEngineWithValueHead):
        role = "critic"

        def _build_module(self) -> Any:
            """The model with a value head; verl 0.9.1's own loader insists on flash attention for this one."""
            config = self.model_config.hf_config
            config.num_labels = 1
            config.classifier_dropout = 0.0
            return AutoModelForTokenClassification.from_pretrained(
                self.model_config.local_path, config=config, dtype=torch.float32
            )
