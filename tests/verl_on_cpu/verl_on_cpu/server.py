"""A token server with the manners of verl's vLLM server, over a transformers model in this process.

Requests that wait are generated together, one batch after another, so the weights never change within a completion and
its version is exact. `abort_all_requests` ends what runs, with the tokens so far, and shuts the gate: later requests
wait, or are refused, until `resume_generation`. One event loop; the model runs in a thread.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from verl.workers.rollout.replica import TokenOutput

from verl_on_cpu.sampling import Row, Sampling, complete

ROUTED_EXPERTS = "VERL_ON_CPU_ROUTED_EXPERTS"


def routed_experts(ids: Sequence[int], *, layers: int = 2, topk: int = 2, experts: int = 8) -> np.ndarray:
    """Experts that a mixture might choose, [ids, layers, topk]; the same for the same id, and telling ids apart."""
    token, layer, rank = np.ix_(np.asarray(ids, dtype=np.int32), np.arange(layers), np.arange(topk))
    return ((token * 3 + token // experts + layer * 5 + rank) % experts).astype(np.int32)


@dataclass(frozen=True)
class Limits:
    """How long a completion may be when the request does not say, and how long any sequence may be, in tokens."""

    prompt: int
    response: int
    context: int

    def sampling(self, prompt: Sequence[int], params: Mapping[str, Any], eos: Iterable[int]) -> Sampling:
        """What vLLM's server makes of the parameters.

        Raises:
            ValueError: the prompt leaves no room for a token, or a parameter is not known.
        """
        room = self.context - len(prompt)
        if room < 1:
            raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room in a context of {self.context}")
        usual = min(self.response, self.prompt + self.response - len(prompt))
        return Sampling.read(params, max_tokens=usual, limit=room, eos=eos)


class TokenServer:
    """Token in, token out; the methods are those that verl calls on a server's actor."""

    def __init__(
        self, model: PreTrainedModel, *, eos: Iterable[int], limits: Limits, max_rows: int = 256, seed: int = 0
    ) -> None:
        self._model = model.eval()
        self._eos = frozenset(eos)
        self._limits = limits
        self._max_rows = max_rows
        self._generator = torch.Generator().manual_seed(seed)
        self._version: int | None = None
        self._waiting: list[tuple[Row, asyncio.Future[int | None]]] = []
        self._serving: asyncio.Task[None] | None = None
        self._between_batches = asyncio.Lock()
        self._open = asyncio.Event()
        self._open.set()
        self._refusing = False

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        request_id: str,
        image_data: Any = None,
        video_data: Any = None,
    ) -> TokenOutput:
        """Complete a prompt; `stop_reason` is "completed" (at a stop token), "length" or "aborted".

        Raises:
            ValueError: images or videos, an unknown sampling parameter, or a prompt as long as the context.
        """
        if image_data or video_data:
            raise ValueError(f"request {request_id!r} carries images or videos; this server knows only tokens")
        prompt = [int(token) for token in prompt_ids]
        row = Row(prompt, self._limits.sampling(prompt, sampling_params, self._eos))
        while not self._open.is_set():
            if self._refusing:
                return TokenOutput(token_ids=[], stop_reason="aborted", extra_fields={"global_steps": self._version})
            await self._open.wait()
        version = await self._completed(row)
        fed = [*prompt, *row.ids][:-1]  # the last sampled token has not been through the model, so has no experts
        return TokenOutput(
            token_ids=row.ids,
            log_probs=row.logprobs if sampling_params.get("logprobs") else None,
            routed_experts=routed_experts(fed) if os.environ.get(ROUTED_EXPERTS) == "1" else None,
            stop_reason=row.ended,
            extra_fields={"global_steps": version},
        )

    async def load_weights(self, weights: Mapping[str, torch.Tensor], version: int | None) -> None:
        """Take a whole state dict between two batches; completions that follow carry this version."""
        async with self._between_batches:
            self._model.load_state_dict(weights)
            self._version = version

    async def abort_all_requests(self, reset_prefix_cache: bool = True, reject_request: bool = False) -> dict[str, int]:
        """Shut the gate and end every completion; returns when all have ended."""
        self._open.clear()
        self._refusing = reject_request
        serving = self._serving
        if serving is None or serving.done():
            return {"aborted_count": 0}
        before = len(self._waiting)
        await asyncio.wait([serving])
        return {"aborted_count": before}

    async def resume_generation(self) -> None:
        """Open the gate."""
        self._refusing = False
        self._open.set()

    async def wake_up(self) -> None:
        """The model is always in memory."""

    async def sleep(self) -> None:
        """The model is always in memory."""

    async def clear_kv_cache(self) -> None:
        """No cache outlives a batch."""

    async def release_kv_cache(self) -> None:
        """No cache outlives a batch."""

    async def resume_kv_cache(self) -> None:
        """No cache outlives a batch."""

    async def start_profile(self, **_: Any) -> None:
        """No profiler."""

    async def stop_profile(self) -> None:
        """No profiler."""

    async def _completed(self, row: Row) -> int | None:
        """Wait until the row has ended; returns the version of the weights that sampled it."""
        done: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((row, done))
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        return await done

    async def _serve(self) -> None:
        """Generate for those who wait until nobody does; whoever has gone away is not generated for."""
        while self._waiting:
            taken, self._waiting = self._waiting[: self._max_rows], self._waiting[self._max_rows :]
            batch = [(row, done) for row, done in taken if not done.done()]
            async with self._between_batches:
                version = self._version
                try:
                    await asyncio.to_thread(self._complete, [row for row, _ in batch])
                except Exception as error:  # noqa: BLE001 - it belongs to those who wait
                    answers = [(done, error) for _, done in batch]
                else:
                    answers = [(done, None) for _, done in batch]
            for done, failed in answers:
                if done.done():
                    continue
                if failed is not None:
                    done.set_exception(failed)
                else:
                    done.set_result(version)

    def _complete(self, rows: Sequence[Row]) -> None:
        complete(self._model, rows, generator=self._generator, interrupted=lambda: not self._open.is_set())
