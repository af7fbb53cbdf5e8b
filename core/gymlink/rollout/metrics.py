"""The figures of a batch, under the names that a trainer logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from gymlink.rollout.figures import Figures
from gymlink.types import DropReason, FailureKind, ForkCause, RolloutStatus

PREFIX = "rollout/"

BREAKDOWNS: Mapping[str, Sequence[str]] = {
    "failed": tuple(kind.value for kind in FailureKind),
    "prefix_breaks": tuple(cause.value for cause in ForkCause),
    "tokens_dropped": tuple(
        reason.value
        for reason in (
            DropReason.FAILED,
            DropReason.FAILED_ATTEMPT,
            DropReason.OTHER_BRANCH,
            DropReason.HISTORY_REWRITTEN,
            DropReason.UNDELIVERED,
        )
    ),
}
"""Parts that are told in every batch, 0 or not: trainers average a name over the batches in which it occurs, and parts
that are left out when 0 would not add up to their sum."""


def batch_metrics(rollouts: Sequence[Figures]) -> dict[str, float]:
    """Means are over the rollouts that were scored; counts and tokens are over all, failed attempts included.

    A sum such as `rollout/failed` comes with its parts, `rollout/failed/timeout` and so on.
    `rollout/tokens_sampled` is `rollout/tokens_trained` plus `rollout/tokens_dropped`. Times are in seconds.
    """
    scored = [rollout for rollout in rollouts if not rollout.has_failed]
    failures = Counter(rollout.failure or "unknown" for rollout in rollouts if rollout.has_failed)
    dropped: Counter[str] = Counter()
    breaks: Counter[str] = Counter()
    for rollout in rollouts:
        dropped.update(rollout.dropped)
        breaks.update(rollout.prefix_breaks)
    figures: dict[str, float] = {
        "count": len(rollouts),
        "failed": sum(failures.values()),
        "truncated": sum(rollout.status is RolloutStatus.TRUNCATED for rollout in rollouts),
        "retried": sum(rollout.attempts > 1 for rollout in rollouts),
        "prefix_breaks": sum(breaks.values()),
        "tokens_sampled": sum(rollout.tokens_sampled for rollout in rollouts),
        "tokens_trained": sum(rollout.tokens_trained for rollout in rollouts),
        "tokens_dropped": sum(dropped.values()),
        "seconds_mean": _mean(rollout.seconds for rollout in rollouts),
        "seconds_max": max((rollout.seconds for rollout in rollouts), default=0.0),
        "seconds_in_model_mean": _mean(rollout.seconds_in_model for rollout in rollouts),
        "seconds_in_environment_mean": _mean(max(0.0, r.seconds - r.seconds_in_model) for r in rollouts),
    }
    if scored:
        figures["reward_mean"] = _mean(rollout.reward or 0.0 for rollout in scored)
        figures["turns_mean"] = _mean(rollout.turns for rollout in scored)
        figures["segments_mean"] = _mean(rollout.segments for rollout in scored)
    for name, parts in (("failed", failures), ("prefix_breaks", breaks), ("tokens_dropped", dropped)):
        figures |= {f"{name}/{part}": parts[part] for part in (*BREAKDOWNS[name], *parts)}
    return {PREFIX + name: float(value) for name, value in figures.items()}


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0
