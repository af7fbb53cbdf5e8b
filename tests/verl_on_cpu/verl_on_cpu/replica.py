"""verl's rollout named "on_cpu": a Ray actor with a token server, and the worker's half that hands it new weights."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import ray
import torch
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica
from verl.workers.rollout.utils import ensure_async_iterator

from verl_on_cpu.server import Limits, TokenServer


def _actor_name(replica_rank: int) -> str:
    return f"verl_on_cpu_server_{replica_rank}"


class CpuServer(TokenServer):
    """A token server over the model in a folder."""

    def __init__(self, path: str, *, prompt: int, response: int, context: int | None, max_rows: int, seed: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        limits = Limits(prompt, response, context or int(model.config.max_position_embeddings))
        eos = _ids(AutoTokenizer.from_pretrained(path).eos_token_id) | _ids(model.generation_config.eos_token_id)
        super().__init__(model, eos=eos, limits=limits, max_rows=max_rows, seed=seed)


def _ids(value: int | Iterable[int] | None) -> set[int]:
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)


class CpuReplica(RolloutReplica):
    """One server, whatever the mode: hybrid, colocated or standalone."""

    async def launch_servers(self) -> None:
        server = (
            ray.remote(CpuServer)
            .options(name=_actor_name(self.replica_rank), num_cpus=0, max_concurrency=self.max_concurrency)
            .remote(
                self.model_config.path,
                prompt=self.config.prompt_length,
                response=self.config.response_length,
                context=self.config.max_model_len,
                max_rows=self.config.max_num_seqs,
                seed=self.config.seed + self.replica_rank,
            )
        )
        self.servers, self._server_handle = [server], server
        self._server_address = _actor_name(self.replica_rank)


class CpuServerAdapter(BaseRollout):
    """Lives in verl's workers; the first worker of a replica passes the trainer's weights on to its server."""

    def __init__(self, *args: Any, replica_rank: int = -1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        workers = (
            self.config.tensor_model_parallel_size
            * self.config.data_parallel_size
            * self.config.pipeline_model_parallel_size
        )
        rank = int(os.environ["RANK"])
        self.replica_rank = rank // workers if replica_rank == -1 else replica_rank
        self.is_leader_rank = rank % workers == 0

    async def resume(self, tags: list[str]) -> None:
        """The model is always in memory."""

    async def release(self) -> None:
        """The model is always in memory."""

    async def update_weights(
        self, weights: Any, wire_format: str = "named_tensors", global_steps: int | None = None, **_: Any
    ) -> None:
        """Every worker draws the weights (gathering a shard takes all of them); the leader sends them."""
        held = {name: tensor.detach().cpu() async for name, tensor in ensure_async_iterator(weights)}
        if self.is_leader_rank:
            server = ray.get_actor(_actor_name(self.replica_rank))
            await server.load_weights.remote(held, global_steps)
