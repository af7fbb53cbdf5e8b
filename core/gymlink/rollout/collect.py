"""Collects a batch of rollouts: bounded concurrency, a deadline for each, an outcome for each, in input order.

Invariant: `collect` returns one rollout per request whatever happens to Gym, the agent or the engine. A rollout
that cannot be scored is a value with a failure, not an exception.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from gymlink.config import AlignmentSettings, RolloutSettings
from gymlink.errors import AlignmentError, ConfigError, GymRequestError
from gymlink.gateway import ROLLOUT_FIELD, OpenRollout, PolicyService, new_rollout_id
from gymlink.rollout.claims import Claims
from gymlink.rollout.figures import Figures, refuse_if_too_many_failed
from gymlink.rollout.metrics import batch_metrics
from gymlink.rollout.outcome import Outcome, failed, scored
from gymlink.types import DropReason, FailureKind, Rollout, RolloutBatch, RolloutRequest, RolloutStatus, Sampling

logger = logging.getLogger(__name__)

OnRollout = Callable[[Rollout], None]

GYMS_ROLLOUT_FIELD = "_ng_rollout_id"
"""Where a row names its rollout for Gym's own capture of token ids (0.6 and newer); before, it is one field more."""


class RunsAgents(Protocol):
    """What the collector needs of `gymlink.gym.GymClient`."""

    async def run(self, agent: str, row: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        """Gym's answer to `/run`. Raises `GymRequestError`."""


class Collector:
    """Collects rollouts of the policy behind `policy` from the agents behind `gym`.

    Args:
        gym: runs a row on an agent.
        policy: the gateway that Gym's model server calls; it holds what was sampled.
        rollout: concurrency, deadline, attempts and how many failures a batch may have.
        alignment: what is trained of a rewritten history.
        owner: this process (rank), written into rollout ids.
        claims: finds the turns of a rollout whose calls did not name it; None where no token ids travel through Gym.
    """

    def __init__(
        self,
        gym: RunsAgents,
        policy: PolicyService,
        rollout: RolloutSettings,
        alignment: AlignmentSettings,
        *,
        owner: int = 0,
        claims: Claims | None = None,
    ) -> None:
        self._gym = gym
        self._policy = policy
        self._settings = rollout
        self._alignment = alignment
        self._owner = owner
        self._claims = claims
        self._slots = asyncio.Semaphore(rollout.concurrency)

    async def collect(
        self,
        requests: Sequence[RolloutRequest],
        on_rollout: OnRollout | None = None,
        *,
        sampling: Sampling | None = None,
    ) -> RolloutBatch:
        """One rollout per request, in their order; `on_rollout` gets each as it ends.

        `sampling` replaces the policy's usual one.

        Raises:
            RolloutError: more than `max_failed_fraction` of the batch failed.
        """

        async def one(request: RolloutRequest) -> Rollout:
            rollout = await self.rollout(request, sampling=sampling)
            if on_rollout is not None:
                on_rollout(rollout)
            return rollout

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(request)) for request in requests]
        except BaseExceptionGroup as failures:
            # One that is no rollout's own failure stops the batch; the rest of the group are its cancelled siblings.
            raise failures.exceptions[0] from None
        rollouts = [task.result() for task in tasks]
        figures = [Figures.of(rollout) for rollout in rollouts]
        refuse_if_too_many_failed(figures, self._settings.max_failed_fraction)
        return RolloutBatch(rollouts, batch_metrics(figures))

    async def rollout(self, request: RolloutRequest, *, sampling: Sampling | None = None) -> Rollout:
        """One rollout, as soon as fewer than `rollout.concurrency` are in flight; its deadline counts from then."""
        async with self._slots:
            return await self._rollout(request, sampling)

    async def _rollout(self, request: RolloutRequest, sampling: Sampling | None) -> Rollout:
        """Try until one attempt is scored, the attempts are used up, or the deadline has passed."""
        started = time.perf_counter()
        past = _Past()
        for attempt in range(1, self._settings.attempts + 1):
            rollout_id = new_rollout_id(self._owner)
            left = self._settings.deadline_s - (time.perf_counter() - started)
            outcome = await self._attempt(request, rollout_id, sampling, left)
            done = outcome.status is not RolloutStatus.FAILED
            out_of_time = time.perf_counter() - started >= self._settings.deadline_s
            if done or out_of_time or attempt == self._settings.attempts:
                return past.finish(request, rollout_id, outcome, attempt, time.perf_counter() - started)
            past.add(outcome)
        raise AssertionError("settings.attempts is at least 1")  # pragma: no cover

    async def _attempt(
        self, request: RolloutRequest, rollout_id: str, sampling: Sampling | None, timeout_s: float
    ) -> Outcome:
        agent, row = request.row["agent_ref"]["name"], _tagged(request.row, rollout_id)
        rollout = self._policy.open(rollout_id, sampling=sampling)
        strangers = self._policy.totals.unattributed_calls
        answer: Mapping[str, Any] | GymRequestError
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._gym.run(agent, row, timeout_s=timeout_s)
        except TimeoutError:
            answer = GymRequestError("the deadline has passed", kind=FailureKind.TIMEOUT)
        except GymRequestError as error:
            answer = error
        finally:
            # Closed before it is looked at: a call of the policy that is still in flight adds nothing any more.
            self._policy.close(rollout_id)
        if isinstance(answer, GymRequestError):
            return self._failed(rollout, answer)
        return self._scored(rollout, answer, self._policy.totals.unattributed_calls - strangers)

    def _failed(self, rollout: OpenRollout, error: GymRequestError) -> Outcome:
        if error.kind == FailureKind.TIMEOUT:
            turns = len(rollout.record.turns)
            deadline = f"rollout.deadline_s = {self._settings.deadline_s:g} s"
            return failed(rollout, FailureKind.TIMEOUT, f"No result within {deadline}; turns until then: {turns}.")
        if rollout.engine_error is not None:
            return failed(rollout, FailureKind.ENGINE, rollout.engine_error)
        return failed(rollout, error.kind, str(error))

    def _scored(self, rollout: OpenRollout, answer: Mapping[str, Any], strangers: int) -> Outcome:
        try:
            return scored(rollout, answer, self._alignment, claims=self._claims, strangers=strangers)
        except AlignmentError as error:
            # A bug of ours, and still no reason to lose the rest of the batch.
            logger.exception("rollout: the sampled turns do not fit together")
            return failed(rollout, FailureKind.ALIGNMENT, str(error))


@dataclass
class _Past:
    """What earlier attempts of a rollout used up."""

    sampled_tokens: int = 0
    seconds_in_model: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        self.sampled_tokens += outcome.sampled_tokens
        self.seconds_in_model += outcome.seconds_in_model
        self.dropped.update({DropReason.FAILED_ATTEMPT: outcome.sampled_tokens})

    def finish(
        self, request: RolloutRequest, rollout_id: str, outcome: Outcome, attempts: int, seconds: float
    ) -> Rollout:
        return Rollout(
            request=request,
            rollout_id=rollout_id,
            status=outcome.status,
            reward=outcome.reward,
            segments=outcome.segments,
            turns=outcome.turns,
            failure=outcome.failure,
            detail=outcome.detail,
            attempts=attempts,
            seconds=seconds,
            seconds_in_model=self.seconds_in_model + outcome.seconds_in_model,
            sampled_tokens=self.sampled_tokens + outcome.sampled_tokens,
            dropped=dict(self.dropped + Counter(outcome.dropped)),
            response=outcome.response,
        )


def _tagged(row: Mapping[str, Any], rollout_id: str) -> dict[str, Any]:
    """The row with the rollout's id where Gym's model server copies it from into every call of the policy.

    `responses_create_params.metadata.extra_body` is a JSON string that `vllm_model` merges into the chat body; what
    the row already has there stays.
    """
    params = row["responses_create_params"]
    metadata = params.get("metadata") or {}
    try:
        extra_body = {**orjson.loads(metadata.get("extra_body") or "{}"), ROLLOUT_FIELD: rollout_id}
    except (orjson.JSONDecodeError, TypeError) as error:
        given = metadata.get("extra_body")
        raise ConfigError(
            f"A row's responses_create_params.metadata.extra_body is not a JSON object in a string: {given!r}."
        ) from error
    tagged = {**metadata, "extra_body": orjson.dumps(extra_body).decode()}
    return {**row, "responses_create_params": {**params, "metadata": tagged}, GYMS_ROLLOUT_FIELD: rollout_id}
