"""`GymRollout`: the rollout function of a GRPOTrainer that collects in NeMo Gym.

One row of tensors per prompt, in order. A failed rollout becomes a row that moves nothing: reward None, one masked
token, so it has no advantage and no part in its siblings' baseline. Every token that the policy sampled is trained in
the row handed to TRL, or counted under the reason why not.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from datasets import Dataset
from rich.console import Console
from transformers import TrainerCallback

from gymlink.config import Settings, load_settings
from gymlink.gym import check_rows
from gymlink.report import Reporter
from gymlink.rollout import Figures, check_conservation, describe_failures
from gymlink.session import Session
from gymlink.types import DropReason, Rollout, RolloutBatch, RolloutRequest, RolloutStatus, Sampling
from gymlink_transformers.engine import LiveModelEngine
from gymlink_transformers.logprobs import SampledRow, max_logprob_error
from gymlink_trl.dataset import load_rows, row_files, row_reference
from gymlink_trl.quiet import FailuresAreTold
from gymlink_trl.support import batching_model, check_trainer, peers_of, sampling_of

if TYPE_CHECKING:
    from trl import GRPOTrainer

Check = Literal["off", "first", "all"]


@dataclass(slots=True)
class Totals:
    """What was collected so far. `tokens_sampled` is always `tokens_trained` plus `tokens_dropped`."""

    rollouts: int = 0
    failed: int = 0
    prefix_breaks: int = 0
    tokens_sampled: int = 0
    tokens_trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def tokens_dropped(self) -> int:
        return self.dropped.total()

    def add(self, rollout: Rollout, row: SampledRow, cut: int) -> None:
        """Count a rollout of which `row` is trained, after `cut` sampled tokens were left off its end."""
        self.rollouts += 1
        self.failed += rollout.status is RolloutStatus.FAILED
        self.prefix_breaks += sum(rollout.prefix_breaks.values())
        self.tokens_sampled += rollout.sampled_tokens
        self.tokens_trained += sum(row.mask)
        self.dropped.update(rollout.dropped)
        if cut:
            self.dropped[DropReason.OVER_LENGTH] += cut


class Collects(Protocol):
    """What `GymRollout` needs of a `gymlink.session.Session`."""

    @property
    def agents(self) -> tuple[str, ...]: ...

    def collect(self, requests: Sequence[RolloutRequest], *, sampling: Sampling | None = None) -> RolloutBatch: ...

    def stop(self) -> None: ...


class GymRollout:
    """Collects the rollouts of a `trl.GRPOTrainer` in NeMo Gym, sampling from the trainer's own live model.

        with GymRollout("gym.yaml") as rollout:
            trainer = GRPOTrainer(
                ..., train_dataset=gym_dataset("train.jsonl"), rollout_func=rollout, reward_funcs=gym_reward
            )
            trainer.train()

    Gym starts with the first collection and stops when training ends, however it ends. With several processes, each
    collects its own slice.

    Args:
        settings: a `gym.yaml`, or what `gymlink.config.load_settings` made of it.
        run_dir: for `rollouts.jsonl` and Gym's logs; `gym` in the trainer's output folder when not given.
        report: told in a few words what is being waited for, and which rollouts of a batch failed; standard error
            when not given.
        check_logprobs: compare the sampled logprobs with a plain forward pass after the first collection, after all,
            or never; the largest difference is in `max_logprob_error` and in the trainer's log.
        max_turn_tokens: how many tokens the policy may sample in one call; the trainer's `max_completion_length`,
            which bounds the whole completion, when not given.
        max_context: tokens that prompt and completion may have together; the model's own limit when not given.
    """

    def __init__(
        self,
        settings: Settings | str | Path,
        *,
        run_dir: str | Path | None = None,
        report: Callable[[str], None] | None = None,
        check_logprobs: Check = "first",
        max_turn_tokens: int | None = None,
        max_context: int | None = None,
    ) -> None:
        self.settings = one_row_per_prompt(settings if isinstance(settings, Settings) else load_settings(settings))
        self.training = Totals()
        self.evaluation = Totals()
        self.max_logprob_error: float | None = None
        self.gym_version: str | None = None
        self._run_dir = Path(run_dir) if run_dir is not None else None
        self._console = Console(stderr=True)
        self._report = report
        self._failures = FailuresAreTold()
        self._check = check_logprobs
        self._max_turn_tokens = max_turn_tokens
        self._max_context = max_context
        self._running: _Running | None = None

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """Collect one rollout per prompt. Called by the trainer.

        Raises:
            RolloutError: too many rollouts of the batch failed. GymlinkError: Gym, the engine or a setting cannot
            work. Gym is stopped before the error leaves.
        """
        try:
            return self._collect(prompts, trainer)
        except BaseException:
            self.close()
            raise

    def prepare(self, trainer: GRPOTrainer) -> None:
        """Start Gym now instead of with the first collection. With several processes, all of them call this.

        Raises as a collection does.
        """
        try:
            self._run(trainer)
        except BaseException:
            self.close()
            raise

    @property
    def agents(self) -> tuple[str, ...]:
        """The agents that run, by name; none before Gym has started and after it has stopped."""
        return self._running.session.agents if self._running is not None else ()

    def close(self) -> None:
        """Stop Gym, when this started it. A later collection starts it anew."""
        self._failures.remove()
        running, self._running = self._running, None
        if running is not None:
            running.session.stop()

    def __enter__(self) -> GymRollout:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _collect(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        totals = self.training if trainer.model.training else self.evaluation
        files = row_files(prompts)
        running = self._run(trainer)
        running.check(files)
        rows_asked = load_rows(prompts, running.session.agents)
        requests = [
            RolloutRequest(row=row, index=index, group=f"{trainer.state.global_step}:{row_reference(prompt)}")
            for index, (prompt, row) in enumerate(zip(prompts, rows_asked, strict=True))
        ]
        sampling = sampling_of(trainer, self._max_turn_tokens)
        with running.engine.sampling(sampling):
            batch = running.session.collect(requests, sampling=sampling)
        if failures := describe_failures([Figures.of(rollout) for rollout in batch.rollouts]):
            self._tell(failures)
        rows = [training_row(rollout, running.eos, trainer.max_completion_length) for rollout in batch.rollouts]
        counts = Totals()
        for rollout, (row, cut) in zip(batch.rollouts, rows, strict=True):
            for count in (counts, totals):
                count.add(rollout, row, cut)
        check_conservation(counts.tokens_sampled, counts.tokens_trained, counts.dropped)
        kept = [row for row, _ in rows]
        metrics = {**batch.metrics, **_token_metrics(counts), **self._logprob_metrics(running, kept, sampling)}
        return _columns(batch.rollouts, kept, metrics)

    def _run(self, trainer: GRPOTrainer) -> _Running:
        if self._running is not None and self._running.trainer() is trainer:
            return self._running
        self.close()
        check_trainer(trainer)
        files = dataset_files(trainer)
        engine = LiveModelEngine(
            batching_model(trainer),
            max_context=self._max_context,
            version=lambda: int(trainer.state.global_step),
            seed=trainer.args.seed,
            batching=trainer.args.transformers_continuous_batching_config or {},
        )
        session = self._open_session(trainer, engine)
        eos = trainer.processing_class.eos_token_id
        self._running = _Running(session, engine, weakref.ref(trainer), eos, unchecked=self._check != "off")
        self._running.check(files)
        self._failures.install()
        if not any(isinstance(one, _CloseAtEnd) and one.rollout is self for one in trainer.callback_handler.callbacks):
            trainer.add_callback(_CloseAtEnd(self))
        return self._running

    def _open_session(self, trainer: GRPOTrainer, engine: LiveModelEngine) -> Collects:
        waiting = Reporter(self._console)
        session = Session(
            self.settings,
            tokenizer=trainer.processing_class,
            engine=engine,
            sampling=sampling_of(trainer, self._max_turn_tokens),
            run_dir=self._run_dir or Path(trainer.args.output_dir) / "gym",
            report=self._report or waiting,
            peers=peers_of(trainer),
        )
        try:
            session.start()
        finally:
            waiting.done()
        self.gym_version = session.gym_version
        return session

    def _tell(self, text: str) -> None:
        """Say something that stays on the terminal."""
        if self._report is not None:
            self._report(text)
        else:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _logprob_metrics(
        self, running: _Running, rows: Sequence[SampledRow], sampling: Sampling
    ) -> Mapping[str, float]:
        if not running.unchecked:
            return {}
        running.unchecked = self._check == "all"
        error = max_logprob_error(running.engine.model, rows, sampling)
        self.max_logprob_error = max(self.max_logprob_error or 0.0, error)
        return {"rollout/max_logprob_error": error}


def gym_reward(
    gym_reward: Sequence[float | None],
    gym_status: Sequence[str],
    gym_metrics: Sequence[Mapping[str, float]],
    log_metric: Callable[[str, float], None],
    log_extra: Callable[[str, list[Any]], None],
    **_: Any,
) -> list[float | None]:
    """The reward function that goes with `GymRollout`: Gym's reward, None for a failed rollout.

    Also hands the batch's figures to the trainer's logger, and each rollout's status to its table of completions.
    """
    for name, value in gym_metrics[0].items():
        log_metric(name, value)
    log_extra("gym_status", list(gym_status))
    return list(gym_reward)


def dataset_files(trainer: GRPOTrainer) -> set[str]:
    """The files that the rows of the trainer's datasets are in; those of a stream are known only as it comes."""
    given = trainer.eval_dataset
    datasets = [trainer.train_dataset, *(given.values() if isinstance(given, Mapping) else [given])]
    return {file for one in datasets if isinstance(one, Dataset) for file in row_files(one["prompt"])}


def one_row_per_prompt(settings: Settings) -> Settings:
    """TRL takes one row per prompt, so of a rewritten history the branch of the final response is trained."""
    if settings.alignment.on_history_rewrite != "fork":
        return settings
    return settings.model_copy(
        update={"alignment": settings.alignment.model_copy(update={"on_history_rewrite": "last"})}
    )


def training_row(rollout: Rollout, eos: int, limit: int | None) -> tuple[SampledRow, int]:
    """The row that TRL gets for a rollout, and how many sampled tokens were cut off its end.

    TRL needs a token in every prompt and completion: a rollout without one gets a masked `eos`. `limit` is TRL's
    `max_completion_length`, which bounds all that follows the first prompt, the environment's tokens included.
    """
    if not rollout.segments:
        prompt = rollout.turns[0].prompt_ids if rollout.turns else ()
        return SampledRow(list(prompt) or [eos], [eos], [0.0], [0]), 0
    segment = rollout.segments[-1]
    ids, mask = list(segment.response_ids[:limit]), list(segment.response_mask[:limit])
    if not ids:
        return SampledRow(list(segment.prompt_ids), [eos], [0.0], [0]), 0
    logprobs = list(segment.response_logprobs[:limit])
    return SampledRow(list(segment.prompt_ids), ids, logprobs, mask), segment.trained_tokens - sum(mask)


def _columns(rollouts: Sequence[Rollout], rows: Sequence[SampledRow], metrics: Mapping[str, float]) -> dict[str, Any]:
    return {
        "prompt_ids": [row.prompt_ids for row in rows],
        "completion_ids": [row.completion_ids for row in rows],
        "logprobs": [row.logprobs for row in rows],
        "env_mask": [row.mask for row in rows],
        "gym_reward": [rollout.reward for rollout in rollouts],
        "gym_status": [rollout.status.value for rollout in rollouts],
        "gym_failure": [rollout.failure for rollout in rollouts],
        "gym_turns": [len(rollout.turns) for rollout in rollouts],
        "gym_response": [rollout.response for rollout in rollouts],
        # Not a list: TRL gives it to every row, and so to the reward function.
        "gym_metrics": metrics,
    }


def _token_metrics(counts: Totals) -> dict[str, float]:
    """The figures that cutting at `max_completion_length` changes."""
    figures = {
        "tokens_trained": counts.tokens_trained,
        "tokens_dropped": counts.tokens_dropped,
        f"tokens_dropped/{DropReason.OVER_LENGTH}": counts.dropped[DropReason.OVER_LENGTH],
    }
    return {f"rollout/{name}": float(value) for name, value in figures.items()}


@dataclass(slots=True)
class _Running:
    session: Collects
    engine: LiveModelEngine
    trainer: weakref.ref[Any]
    eos: int
    unchecked: bool
    checked_files: set[str] = field(default_factory=set)

    def check(self, files: set[str]) -> None:
        """Check that the agents of these files' rows run, once for each file."""
        for file in sorted(files - self.checked_files):
            check_rows(file, self.session.agents)
            self.checked_files.add(file)


class _CloseAtEnd(TrainerCallback):
    """Stops Gym when training ends."""

    def __init__(self, rollout: GymRollout) -> None:
        self.rollout = rollout

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.rollout.close()
