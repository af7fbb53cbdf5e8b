"""What a trainer and `gymlink serve` tell each other: the requests of the control routes, and their answers.

Requests are checked where they come in; an unknown field is an error. Answers are these values as JSON. Each sampled id
crosses the wire once, in its segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gymlink.types import FinishReason, ForkCause, Rollout, RolloutStatus, Sampling, Segment, Turn

PREFIX = "/gymlink"
"""All control routes begin with it; what agents call does not."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplingRequest(_Request):
    """How to sample, where it differs from what the gateway was started with."""

    temperature: float | None = Field(None, ge=0.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    max_tokens: int | None = Field(None, ge=1)

    def applied_to(self, sampling: Sampling) -> Sampling:
        """`sampling` with the fields that are given here."""
        return dataclasses.replace(sampling, **self.model_dump(exclude_none=True))


class OpenRequest(_Request):
    """Open a rollout for an agent of the trainer's own."""

    sampling: SamplingRequest = SamplingRequest()
    deadline_s: float | None = Field(None, gt=0)
    """The rollout is closed and forgotten when it has not been closed by then; `rollout.deadline_s` when not given."""


class CloseRequest(_Request):
    """Close a rollout and hand over what it sampled."""

    on_history_rewrite: Literal["fork", "last", "mask"] | None = None
    last_turn: int | None = Field(None, ge=0)
    """Index of the turn that gave the final response; the latest when not given."""


class CollectRequest(_Request):
    """Collect rollouts of Gym rows."""

    rows: list[dict[str, Any]] = Field(min_length=1)
    samples: int = Field(1, ge=1)
    """Rollouts of each row: a group of siblings."""
    sampling: SamplingRequest = SamplingRequest()


class PauseRequest(_Request):
    """Let no further generation begin, and wait for those in flight."""

    drain_s: float = Field(60.0, ge=0)
    """How long to wait for them; 0 waits not at all."""


class ResumeRequest(_Request):
    """Sample again."""

    weight_version: int | None = Field(None, ge=0)
    """The version of the weights that sample from now; unchanged when not given."""


class WeightsRequest(_Request):
    """Have the engine load the weights in a folder."""

    path: str = Field(min_length=1)
    weight_version: int | None = Field(None, ge=0)
    """Their version; one more than the last when not given."""
    drain_s: float = Field(60.0, ge=0)


@dataclass(frozen=True, slots=True)
class OpenedRollout:
    """Where an agent reaches the policy for one rollout: `base_url` as OpenAI's clients take it, and a key that opens
    this rollout alone. Anthropic's clients append "/v1" themselves: theirs is `anthropic_base_url`."""

    rollout_id: str
    base_url: str
    anthropic_base_url: str
    api_key: str


@dataclass(frozen=True, slots=True)
class TurnFigures:
    """One call of the policy without its ids, which the segments hold. Fields as in `gymlink.types.Turn`."""

    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason
    weight_version: int
    parent: int | None = None
    cause: ForkCause | None = None
    oldest_weight_version: int | None = None
    routed_experts: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, turn: Turn) -> TurnFigures:
        return cls(
            prompt_tokens=turn.prompt_tokens,
            completion_tokens=len(turn.completion_ids),
            finish_reason=turn.finish_reason,
            weight_version=turn.weight_version,
            parent=turn.parent,
            cause=turn.cause,
            oldest_weight_version=turn.oldest_weight_version,
            routed_experts=turn.routed_experts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedRollout:
    """What a rollout sampled. `segments[-1]` is the branch that ends in the final response.

    `dropped` counts sampled tokens that no segment trains, by reason: with the segments' trained tokens it adds up to
    `sampled_tokens`. `engine_error` is the last failure of the engine, if there was one; `overflowed` says whether a
    prompt left no room for a token.
    """

    rollout_id: str
    segments: Sequence[Segment] = ()
    turns: Sequence[TurnFigures] = ()
    sampled_tokens: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    seconds_in_model: float = 0.0
    engine_error: str | None = None
    overflowed: bool = False

    @property
    def trained_tokens(self) -> int:
        return sum(segment.trained_tokens for segment in self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedRollout:
    """One rollout of a Gym row. Fields as in `gymlink.types.Rollout`; `row` is the index of its row in the request.

    A failed one has no reward and no segment: leave it out of the loss and of its group's baseline.
    """

    rollout_id: str
    row: int
    status: RolloutStatus
    reward: float | None
    segments: Sequence[Segment] = ()
    turns: Sequence[TurnFigures] = ()
    failure: str | None = None
    detail: str | None = None
    attempts: int = 1
    seconds: float = 0.0
    seconds_in_model: float = 0.0
    sampled_tokens: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    response: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, rollout: Rollout, row: int) -> CollectedRollout:
        return cls(
            rollout_id=rollout.rollout_id,
            row=row,
            status=rollout.status,
            reward=rollout.reward,
            segments=rollout.segments,
            turns=tuple(map(TurnFigures.of, rollout.turns)),
            failure=rollout.failure,
            detail=rollout.detail,
            attempts=rollout.attempts,
            seconds=rollout.seconds,
            seconds_in_model=rollout.seconds_in_model,
            sampled_tokens=rollout.sampled_tokens,
            dropped=rollout.dropped,
            response=rollout.response,
        )


@dataclass(frozen=True, slots=True)
class Collected:
    """The rollouts of the rows, those of one row side by side, and the figures to log about them."""

    rollouts: Sequence[CollectedRollout]
    metrics: Mapping[str, float]

    @property
    def groups(self) -> Sequence[Sequence[CollectedRollout]]:
        """The rollouts by row, in the order of the rows: siblings, to be compared with each other."""
        by_row: dict[int, list[CollectedRollout]] = {}
        for rollout in self.rollouts:
            by_row.setdefault(rollout.row, []).append(rollout)
        return list(by_row.values())


@dataclass(frozen=True, slots=True)
class Status:
    """How the gateway is.

    `ready` is false while NeMo Gym starts; `agents` are those that it runs then. `in_flight` are generations. Of
    `sampled_tokens`, `unattributed_tokens` were sampled for calls that named no rollout, and `abandoned_tokens` for
    rollouts that had ended by then.
    """

    model: str
    ready: bool
    weight_version: int
    paused: bool
    in_flight: int
    open_rollouts: int
    requests: int
    sampled_tokens: int
    unattributed_tokens: int
    abandoned_tokens: int
    max_context: int | None = None
    agents: Sequence[str] = ()
