"""verl's own replay buffer (`trainer.v1.sampler.custom_sampler`), which also judges how collecting went.

It samples exactly as verl's does. Around that it does what only the trainer's process can: it ends the run with a clear
error when Gym does not start, dies, or when too much fails (verl itself would crash on an empty batch, or ask for
replacements without end), and it hands the figures of the rollouts to the trainer's log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from gymlink.errors import ConfigError, GymlinkError, RolloutError
from gymlink.rollout import Figures, batch_metrics, describe_failures, refuse_if_too_many_failed
from gymlink.types import DropReason
from gymlink_verl.job import job_of

POLL_INTERVAL_S = 0.5
"""How often finished groups are looked for; verl's own default is 2 s, a third of a short step."""
EMPTY = "no materializable trajectories"
"""In what verl (0.9.1) says of a batch without a row; its other errors are about something else."""
OWN_REASONS = (DropReason.ALONE_IN_GROUP, DropReason.OVER_LENGTH)
"""Reasons of this plugin's for which sampled tokens are dropped: told in every batch, as the core's are."""
SPLITS = {"train": "training", "val": "validation"}


def gym_sampler(**given: Any) -> ReplayBuffer:
    """The replay buffer for the trainer mode that verl asks for, with the settings that verl gives its own one."""
    kind = GymReplayBuffer if given["trainer_mode"] == "sync" else GymReplayBufferAsync
    sampler: ReplayBuffer = kind(**given)
    return sampler


class _Judging(ReplayBuffer):
    """What both replay buffers add to verl's. Stands before the class that samples."""

    def __init__(self, *, sampler_kwargs: Mapping[str, Any], refill_fn: Callable[[int], Any], **given: Any) -> None:
        self._job = job_of(sampler_kwargs["gymlink"])
        self._allowed = self._job.settings().rollout.max_failed_fraction
        self._told: dict[str, list[Figures]] = {split: [] for split in SPLITS}
        self._unjudged: list[Figures] = []
        self._enough = int(sampler_kwargs["train_batch_size"])
        self._siblings = int(sampler_kwargs["rollout_n"])
        self._started = False
        self._refill = refill_fn
        super().__init__(
            sampler_kwargs=sampler_kwargs,
            refill_fn=self._judged_refill,
            poll_interval=POLL_INTERVAL_S,
            **_own_settings(sampler_kwargs, given["trainer_mode"]),
            **given,
        )

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, Any]]:
        """A batch, and with verl's figures those of the rollouts that ended since the last one.

        Raises:
            GymlinkError: Gym did not start or has died, too many rollouts failed, or nothing of the batch was scored.
        """
        with self._noting():
            self._wait_for_gym()
            batch, metrics = self._sampled(global_steps, partition_id, batch_size)
            return batch, metrics | self._report(partition_id, empty=not batch.keys)

    def _sampled(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, Any]]:
        try:
            sampled: tuple[KVBatchMeta, dict[str, Any]] = super().sample(
                global_steps=global_steps, partition_id=partition_id, batch_size=batch_size
            )
        except RuntimeError as error:
            if EMPTY in str(error):
                # Why, the job knows better; when it does not, the error is verl's own.
                self._report(partition_id, empty=True)
            raise
        return sampled

    def _report(self, split: str, *, empty: bool) -> dict[str, float]:
        told = [*self._told[split], *self._job.take(split)]
        self._told[split] = []
        if empty and told:
            raise RolloutError(
                f"No {SPLITS[split]} rollout of this batch could be used. {describe_failures(told) or 'None failed.'}"
            )
        if split == "train":
            self._judge(told)
        return {f"rollout/tokens_dropped/{reason}": 0.0 for reason in OWN_REASONS} | batch_metrics(told)

    def _judge(self, told: list[Figures]) -> None:
        """Asynchronous trainers take batches of few rollouts: those wait until there are enough to judge."""
        self._unjudged += told
        if len(self._unjudged) >= self._enough:
            refuse_if_too_many_failed(self._unjudged, self._allowed)
            self._unjudged = []

    def _judged_refill(self, prompts: int) -> Any:
        """verl replaces groups that failed, without end: stop when that is what most of them do.

        A failure is often faster than a success, so what is under way counts as not failed.
        """
        with self._noting():
            self._wait_for_gym()
            self._told["train"] += self._job.take("train")
            told = [*self._unjudged, *self._told["train"]]
            groups = len(self.pending_keys["train"]) + len(self.running_keys["train"])
            under_way = self._siblings * groups
            if len(told) >= self._enough:
                refuse_if_too_many_failed(told, self._allowed, under_way=under_way)
            if len(told) >= self._enough + under_way and not any(rollout.tokens_trained for rollout in told):
                raise RolloutError(f"Nothing can be trained. {describe_failures(told) or 'None failed.'}")
        return self._refill(prompts)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """What ends the run is left in writing for whoever started it."""
        try:
            yield
        except GymlinkError as error:
            self._job.note(error)
            raise

    def _wait_for_gym(self) -> None:
        if not self._started:
            self._job.wait()
            self._started = True


class GymReplayBuffer(_Judging):
    """For the synchronous trainer."""


class GymReplayBufferAsync(_Judging, ReplayBufferAsync):
    """For the asynchronous trainers."""


def _own_settings(sampler_kwargs: Mapping[str, Any], trainer_mode: str) -> dict[str, Any]:
    """The settings that verl gives to its own replay buffer and not to a custom one (`PPOTrainer`, 0.9.1).

    Raises:
        ConfigError: groups are to be filtered, but not by what.
    """
    groups = sampler_kwargs.get("filter_groups") or {}
    metric = groups.get("metric") if groups.get("enable") else None
    if groups.get("enable") and not metric:
        raise ConfigError(
            "algorithm.filter_groups.enable needs algorithm.filter_groups.metric: 'reward' filters groups whose "
            "rollouts all have the same."
        )
    refill = bool(sampler_kwargs.get("sync_refill_failed_groups"))
    settings: dict[str, Any] = {"filter_groups_metric": metric, "sync_refill_failed_groups": refill}
    if trainer_mode != "sync":
        return settings
    train_batch_size = sampler_kwargs["train_batch_size"]
    exact = metric is not None or refill
    return settings | {
        "train_batch_size": train_batch_size,
        "gen_batch_size": 1 if exact else sampler_kwargs.get("gen_batch_size") or train_batch_size,
        "max_inflight_gen_batches": groups.get("max_inflight_gen_batches", 1) if metric is not None else 1,
    }
