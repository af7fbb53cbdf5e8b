"""A transformers model behind `gymlink serve`: it samples at all times, but while its weights change.

Invariant: nothing is sampled while weights are replaced, and no cache entry outlives the weights that made it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from gymlink.engines import Engine
from gymlink.errors import ConfigError, EngineError
from gymlink.hookspecs import EngineRequest
from gymlink.types import Generation, Sampling
from gymlink_transformers.engine import LiveModelEngine


class ServedModelEngine:
    """An `Engine` on a model that nothing else uses. It loads further weights from folders (`UpdatesWeights`).

    Args:
        model: on its device.
        sampling: of every call; only `max_tokens` may differ from call to call.
        max_context: tokens that prompt and completion may have together; the model's own limit when not given.

    Raises:
        PluginError: this model or this sampling cannot be batched continuously.
        EngineError: the KV cache does not fit into memory.
    """

    def __init__(self, model: PreTrainedModel, sampling: Sampling, *, max_context: int | None = None) -> None:
        self._version = 0
        self._model = model
        self._sampling = sampling
        self._live = LiveModelEngine(model, max_context=max_context, version=lambda: self._version)
        self._period = ExitStack()
        self._period.enter_context(self._live.sampling(sampling))

    @property
    def max_context(self) -> int | None:
        return self._live.max_context

    @property
    def weight_version(self) -> int:
        return self._version

    def set_weight_version(self, version: int) -> None:
        """The weights are of this version. See `gymlink.engines.UpdatesWeights`."""
        self._version = version

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, stop_token_ids: Sequence[int], rollout_id: str
    ) -> Generation:
        before = self._version
        said = await self._live.generate(prompt_ids, sampling, stop_token_ids=stop_token_ids, rollout_id=rollout_id)
        # Whoever changes the model's weights in place tells their version while generations may be in flight.
        oldest = before if before != self._version else None
        return replace(said, weight_version=self._version, oldest_weight_version=oldest)

    async def load_weights(self, path: str, version: int) -> None:
        """Sample from the weights in the folder `path` from now on. What is in flight fails: drain first.

        Raises:
            EngineError: they cannot be loaded, or do not fit the model; the old ones stay.
        """
        await asyncio.to_thread(self._replace_weights, path, version)

    def _replace_weights(self, path: str, version: int) -> None:
        if not Path(path).is_dir():
            raise EngineError(f"There is no folder {path!r} to load weights from.")
        try:
            fresh = type(self._model).from_pretrained(path, dtype=self._model.dtype).state_dict()
        except (OSError, ValueError, RuntimeError) as error:
            raise EngineError(f"The weights in {path!r} cannot be loaded: {error}") from error
        own = self._model.state_dict()
        if differing := [name for name in own.keys() | fresh.keys() if _shape(own, name) != _shape(fresh, name)]:
            raise EngineError(
                f"The weights in {path!r} are another model's: {sorted(differing)[0]!r} differs in shape."
            )
        self._period.close()
        self._model.load_state_dict(fresh)
        self._version = version
        self._period.enter_context(self._live.sampling(self._sampling))

    async def aclose(self) -> None:
        await self._live.aclose()
        await asyncio.to_thread(self._period.close)


def _shape(state: dict[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def make(request: EngineRequest) -> Engine:
    """Loads `request.model` onto the GPU, if there is one.

    Raises:
        ConfigError: there is no such model.
    """
    logging.disable_progress_bar()  # type: ignore[no-untyped-call] # one for each loading of weights would fill the terminal
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(request.model, dtype="auto")
    except (OSError, ValueError) as error:
        raise ConfigError(f"The model {request.model!r} cannot be loaded: {error}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    return ServedModelEngine(cast("PreTrainedModel", model), request.sampling, max_context=request.max_context)
