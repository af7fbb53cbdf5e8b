"""The figures of a batch, under the names that a trainer logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from gymlink.types import Rollout, RolloutStatus

PREFIX = "rollout/"


def batch_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means are over the rollouts that were scored; counts and tokens are over all, failed attempts included.

    `rollout/tokens_sampled` is `rollout/tokens_trained` plus `rollout/tokens_dropped`. Times are in seconds.
    """
    scored = [rollout for rollout in rollouts if rollout.status is not RolloutStatus.FAILED]
    failures = Counter(rollout.failure or "unknown" for rollout in rollouts if rollout.status is RolloutStatus.FAILED)
    dropped: Counter[str] = Counter()
    breaks: Counter[str] = Counter()
    for rollout in rollouts:
        dropped.update(rollout.dropped)
        breaks.update({cause.value: count for cause, count in rollout.prefix_breaks.items()})
    figures: dict[str, float] = {
        "count": len(rollouts),
        "failed": sum(failures.values()),
        "truncated": sum(rollout.status is RolloutStatus.TRUNCATED for rollout in rollouts),
        "retried": sum(rollout.attempts > 1 for rollout in rollouts),
        "prefix_breaks": sum(breaks.values()),
        "tokens_sampled": sum(rollout.sampled_tokens for rollout in rollouts),
        "tokens_trained": sum(rollout.trained_tokens for rollout in rollouts),
        "tokens_dropped": sum(dropped.values()),
        "seconds_mean": _mean(rollout.seconds for rollout in rollouts),
        "seconds_max": max((rollout.seconds for rollout in rollouts), default=0.0),
        "seconds_in_model_mean": _mean(rollout.seconds_in_model for rollout in rollouts),
        "seconds_in_environment_mean": _mean(max(0.0, r.seconds - r.seconds_in_model) for r in rollouts),
    }
    if scored:
        figures["reward_mean"] = _mean(rollout.reward or 0.0 for rollout in scored)
        figures["turns_mean"] = _mean(len(rollout.turns) for rollout in scored)
        figures["segments_mean"] = _mean(len(rollout.segments) for rollout in scored)
    figures |= {f"failed/{kind}": count for kind, count in failures.items()}
    figures |= {f"prefix_breaks/{cause}": count for cause, count in breaks.items()}
    figures |= {f"tokens_dropped/{reason}": count for reason, count in dropped.items()}
    return {PREFIX + name: float(value) for name, value in figures.items()}


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0
