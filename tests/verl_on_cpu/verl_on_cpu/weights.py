"""verl's checkpoint engine named "on_cpu", for trainer.v1.trainer_mode=separate_async.

The trainer's first worker owns a queue (a Ray actor) and tells the others of it through the metadata that verl passes
around; the weights travel through Ray's object store, one copy for each rollout worker.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import torch
from ray.util.queue import Queue
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from verl_on_cpu.registry import NAME


@CheckpointEngineRegistry.register(NAME)
class QueueCheckpointEngine(CheckpointEngine):
    """Whole state dicts through a queue."""

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self._master = is_master
        self._own: Queue | None = None
        self._queue: Queue | None = None
        self._receivers = 0

    def prepare(self) -> dict[str, Any]:
        if self._master and self._own is None:
            self._own = Queue(actor_options={"num_cpus": 0})
        return {"queue": self._own}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        def each(size: int) -> dict[str, list[Any]]:
            return {"queue": [metadata[0]["queue"]] * size, "receivers": [rollout_world_size] * size}

        return each(actor_wg_world_size), each(rollout_world_size)

    def init_process_group(self, *, queue: Queue, receivers: int) -> None:
        self._queue, self._receivers = queue, receivers

    def finalize(self) -> None:
        """The queue serves the next time too; it ends with its owner."""

    async def send_weights(self, weights: Any, global_steps: int | None = None) -> None:
        held = {name: tensor.detach().cpu() for name, tensor in weights}
        if self._own is not None:
            for _ in range(self._receivers):
                await self._own.put_async(held)

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        assert self._queue is not None, "verl calls init_process_group first"
        for named in (await self._queue.get_async()).items():
            yield named
