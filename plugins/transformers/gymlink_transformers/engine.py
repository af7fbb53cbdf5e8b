"""The policy engine on the trainer's own live model, through transformers' continuous batching.

Sampling happens only inside `with engine.sampling(...)`, and weights change only outside it. Each such period has a
batching manager of its own: prompts share their KV cache within the period (a later turn re-reads its own history for
free), and no cache entry outlives the weights that made it. On leaving, the model is as it was: training modes,
attention implementation and torch's random state are put back, the cache's memory is free for the training step, and
no thread is left that could keep the interpreter from ending.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from gymlink.errors import ContextOverflowError, EngineError, PluginError
from gymlink.types import FinishReason, Generation, Logprobs, Sampling, TokenIds

CACHE_TOKENS_ON_CPU = 65_536
"""Tokens of KV cache without a GPU, where transformers would take 60 % of the machine's memory."""


class LiveModelEngine:
    """A `gymlink.engines.Engine` that samples from a transformers model in this process.

    Args:
        model: the unwrapped model that is being trained, on its device.
        max_context: tokens that prompt and completion may have together; the model's own limit when not given.
        version: says how often the weights were updated so far.
        seed: where the engine's own random stream starts. It never touches the trainer's.
        batching: fields of transformers' `ContinuousBatchingConfig`, to size the cache for instance.

    Raises:
        PluginError: the model cannot be batched continuously, or `batching` names an unknown field.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_context: int | None = None,
        version: Callable[[], int] = lambda: 0,
        seed: int = 0,
        batching: Mapping[str, Any] | None = None,
    ) -> None:
        if not hasattr(model, "init_continuous_batching"):
            raise PluginError(
                f"{type(model).__name__} has no continuous batching in this version of transformers: "
                "the engine on the trainer's live model cannot sample from it."
            )
        if _is_flash(model) and model.dtype == torch.float32:
            raise PluginError(
                f"{model.config._attn_implementation} computes in 16 bits only, and the weights are float32: "
                "load the model with dtype: bfloat16, or with attn_implementation: sdpa."
            )
        self.model = model
        self._version = version
        self._seeds = random.Random(seed)  # noqa: S311 - a stream to sample from, no secret
        self._model_context = max_context or _position_limit(model)
        self._batching = {**_batching_defaults(model, self._model_context), **(batching or {})}
        self._period: _Period | None = None
        self._closed = False

    @property
    def max_context(self) -> int | None:
        """The model's limit, or what the KV cache holds where that is less."""
        limits = [self._model_context, self._period.capacity if self._period else None]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def weight_version(self) -> int:
        return self._version()

    @contextmanager
    def sampling(self, sampling: Sampling) -> Iterator[None]:
        """The period of one collection: `generate` works inside, and the weights must not change.

        Raises:
            EngineError: a period is open already, or the KV cache does not fit into memory.
            PluginError: this model or these settings cannot be batched continuously.
        """
        if self._period is not None:
            raise EngineError("The engine is sampling already: one collection at a time.")
        model = self.model
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []))
            stack.enter_context(as_sampled(model))
            manager = self._make_manager(sampling)
            self._period = _Period(manager, replace(sampling, max_tokens=None), self._version())
            try:
                with self._period:
                    yield
            finally:
                self._period = None

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, stop_token_ids: Sequence[int], rollout_id: str
    ) -> Generation:
        period = self._period
        if self._closed:
            raise EngineError("The engine is closed.")
        if period is None:
            raise EngineError("The trainer is not collecting rollouts now: its model samples only during a collection.")
        if replace(sampling, max_tokens=None) != period.sampling:
            raise EngineError(f"This collection samples with {period.sampling!r}, and a call asked for {sampling!r}.")
        context = self.max_context or period.capacity
        room = context - len(prompt_ids)
        if room < 1:
            raise ContextOverflowError(len(prompt_ids), context)
        limit = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        return await period.generate(prompt_ids, limit, stop_token_ids, rollout_id)

    async def aclose(self) -> None:
        """Refuse any further call. Nothing else outlives `sampling`."""
        self._closed = True

    def _make_manager(self, sampling: Sampling) -> Any:
        try:
            config = ContinuousBatchingConfig(
                **{**self._batching, "return_logprobs": True, "seed": self._seeds.getrandbits(31)}
            )
            model: Any = self.model
            manager = model.init_continuous_batching(
                generation_config=_generation_config(sampling), continuous_batching_config=config
            )
        except (TypeError, ValueError) as error:
            raise PluginError(f"transformers cannot batch {type(self.model).__name__} continuously: {error}") from error
        try:
            manager.warmup()  # makes the cache here, so that a failure is ours to report and not a dead thread's
        except (MemoryError, ValueError, torch.OutOfMemoryError) as error:
            raise EngineError(
                f"The KV cache does not fit: {error}. Make it smaller, for instance with "
                "transformers_continuous_batching_config: {max_memory_percent: 0.3} or {num_blocks: ...}."
            ) from error
        return manager


@dataclass(frozen=True, slots=True)
class _Call:
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]

    def settle(self, result: Any) -> None:
        """Give the waiting call its output, or the error that ends it, from any thread."""

        def settle() -> None:
            if not self.future.done():
                if isinstance(result, Exception):
                    self.future.set_exception(result)
                else:
                    self.future.set_result(result)

        # The loop of a call that nobody waits for any more may be closed.
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(settle)


class _Period:
    """One manager, from start to stop. Every call is settled: by its output, or by why there will be none."""

    def __init__(self, manager: Any, sampling: Sampling, weight_version: int) -> None:
        self.sampling = sampling
        config = manager.continuous_batching_config
        self.capacity: int = config.num_blocks * config.page_size
        self._manager = manager
        self._weight_version = weight_version
        self._serial = itertools.count()
        self._lock = threading.Lock()
        self._calls: dict[str, _Call] = {}
        self._over: EngineError | None = None
        self._delivery = threading.Thread(target=self._deliver, name="gymlink-delivery", daemon=True)

    def __enter__(self) -> _Period:
        self._manager.start()
        self._delivery.start()
        return self

    def __exit__(self, *_: object) -> None:
        # First refuse further calls here: the manager would warn of each, and an interrupt leaves many open.
        with self._lock:
            self._over = self._reason()
        self._manager.stop(block=True, hard_stop=True)
        self._delivery.join()

    async def generate(
        self, prompt_ids: Sequence[int], limit: int, stop_token_ids: Sequence[int], rollout_id: str
    ) -> Generation:
        key = f"{rollout_id}#{next(self._serial)}"
        loop = asyncio.get_running_loop()
        call = _Call(loop, loop.create_future())
        with self._lock:
            if self._over is not None:
                raise self._over
            self._calls[key] = call
        stops = list(stop_token_ids)
        try:
            accepted = self._manager.add_request(
                list(prompt_ids), request_id=key, max_new_tokens=limit, eos_token_id=stops
            )
            if accepted is None:
                raise self._reason()
            output = await call.future
        except asyncio.CancelledError:
            self._manager.cancel_request(key)
            raise
        finally:
            with self._lock:
                self._calls.pop(key, None)
        if output.error is not None:
            raise EngineError(f"transformers' continuous batching failed: {output.error}")
        return self._generation(output, stops)

    def _generation(self, output: Any, stops: Sequence[int]) -> Generation:
        ids = TokenIds(int(token) for token in output.generated_tokens)
        reason: FinishReason = "stop" if ids and ids[-1] in stops else "length"
        return Generation(
            token_ids=ids,
            logprobs=Logprobs(float(logprob) for logprob in output.logprobs),
            finish_reason=reason,
            weight_version=self._weight_version,
        )

    def _deliver(self) -> None:
        while True:
            output = self._manager.get_result(timeout=0.1)
            if output is not None:
                with self._lock:
                    call = self._calls.get(output.request_id)
                if call is not None:
                    call.settle(output)
            elif not self._manager.is_running():
                break
        with self._lock:
            self._over = self._reason()
            calls = list(self._calls.values())
        for call in calls:
            call.settle(self._over)

    def _reason(self) -> EngineError:
        fatal = self._manager.background_thread_status.fatal_error
        if fatal is None:
            return EngineError("The collection is over: the trainer's model has stopped sampling.")
        error = EngineError(f"Sampling from the trainer's model died: {type(fatal).__name__}: {fatal}")
        error.__cause__ = fatal
        return error


@contextmanager
def as_sampled(model: torch.nn.Module) -> Iterator[None]:
    """The model as the engine samples from it: in eval mode, computing in the type of its own weights.

    Accelerate's mixed precision replaces the model's `forward` by one under autocast, whose keys and values do not
    fit a KV cache of the weights' type. On leaving, each module has back its own mode and `forward`.
    """
    modes = [(module, module.training) for module in model.modules()]
    wrapped = model.__dict__.pop("forward", None)
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        if wrapped is not None:
            model.__dict__["forward"] = wrapped


def _generation_config(sampling: Sampling) -> GenerationConfig:
    greedy = sampling.temperature == 0.0
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=not greedy,
        temperature=1.0 if greedy else sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p or None,
        eos_token_id=-1,  # each call brings its own stop ids
        pad_token_id=0,
    )


def _is_flash(model: PreTrainedModel) -> bool:
    return str(model.config._attn_implementation).startswith(("flash", "kernels"))


def _position_limit(model: PreTrainedModel) -> int | None:
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def _batching_defaults(model: PreTrainedModel, context: int | None) -> dict[str, Any]:
    """A cache that leaves room to train, and batches that suit attention with a dense mask.

    Without flash attention a batch attends over all of its requests' tokens under a mask, so its cost grows with the
    square of its tokens: smaller batches are faster.
    """
    defaults: dict[str, Any] = {
        # The numbers must be the trainer's own: no other attention kernel than the one it trains with.
        "auto_switch_to_flash": False,
        "allow_block_sharing": True,
        # A graph would be captured anew in each period.
        "use_cuda_graph": False,
        "max_memory_percent": 0.5,
    }
    if not _is_flash(model):
        defaults |= {"page_size": 16, "max_batch_tokens": 256 if model.device.type == "cpu" else 2048}
    if model.device.type == "cpu":
        page_size = defaults.get("page_size", 256)
        # At least one rollout of full length must fit, or it could never be scheduled.
        defaults["num_blocks"] = -(-max(CACHE_TOKENS_ON_CPU, context or 0) // page_size)
    return defaults
