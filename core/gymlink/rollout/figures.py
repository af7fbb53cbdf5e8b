"""A rollout in figures: small enough to be sent from process to process, and all that a batch is judged by.

Invariant: `tokens_sampled == tokens_trained + sum(dropped.values())`, whoever made them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gymlink.errors import RolloutError
from gymlink.types import Rollout, RolloutStatus

DETAIL_LENGTH = 300
"""Characters of a failure's detail that are told."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What became of one rollout, in numbers. Times are in seconds."""

    status: RolloutStatus
    reward: float | None = None
    failure: str | None = None
    detail: str | None = None
    attempts: int = 1
    turns: int = 0
    segments: int = 0
    tokens_sampled: int = 0
    tokens_trained: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    prefix_breaks: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_in_model: float = 0.0

    @classmethod
    def of(cls, rollout: Rollout) -> Figures:
        return cls(
            status=rollout.status,
            reward=rollout.reward,
            failure=rollout.failure,
            detail=rollout.detail,
            attempts=rollout.attempts,
            turns=len(rollout.turns),
            segments=len(rollout.segments),
            tokens_sampled=rollout.sampled_tokens,
            tokens_trained=rollout.trained_tokens,
            dropped=rollout.dropped,
            prefix_breaks={cause.value: count for cause, count in rollout.prefix_breaks.items()},
            seconds=rollout.seconds,
            seconds_in_model=rollout.seconds_in_model,
        )

    @property
    def has_failed(self) -> bool:
        return self.status is RolloutStatus.FAILED

    def check_conservation(self) -> None:
        """Raises `RolloutError` when a sampled token is neither trained nor counted under a reason."""
        check_conservation(self.tokens_sampled, self.tokens_trained, self.dropped)


def check_conservation(sampled: int, trained: int, dropped: Mapping[str, int]) -> None:
    """Raises `RolloutError` when `sampled` tokens are not what is trained and what is dropped, by reason, together."""
    counted = sum(dropped.values())
    if trained + counted != sampled:
        raise RolloutError(
            f"{sampled} tokens were sampled, but {trained} are trained and {counted} counted as dropped "
            f"({dict(dropped)}). Please report this: it is a defect of gymlink."
        )


def describe_failures(rollouts: Sequence[Figures]) -> str | None:
    """One line about those that failed: how many, of which kinds, and what became of the first. None when none did."""
    failed = [rollout for rollout in rollouts if rollout.has_failed]
    if not failed:
        return None
    kinds = ", ".join(f"{kind}: {count}" for kind, count in Counter(one.failure for one in failed).most_common())
    detail = " ".join((failed[0].detail or "no more is known").split())
    if len(detail) > DETAIL_LENGTH:
        detail = f"{detail[: DETAIL_LENGTH - 1]}…"
    return f"{len(failed)} of {len(rollouts)} rollouts failed ({kinds}); the first: {detail}"


def refuse_if_too_many_failed(rollouts: Sequence[Figures], allowed: float, *, under_way: int = 0) -> None:
    """Raises `RolloutError` when more than the share `allowed` of these rollouts failed.

    `under_way` is how many more belong to them and have not ended yet.
    """
    failed = sum(rollout.has_failed for rollout in rollouts)
    if failed > allowed * (len(rollouts) + under_way):
        raise RolloutError(
            f"Too many rollouts failed, more than rollout.max_failed_fraction = {allowed:g} allows. "
            f"{describe_failures(rollouts)}"
        )
