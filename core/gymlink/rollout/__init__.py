"""Rollout orchestration: from rows to scored rollouts, concurrently, each with a deadline and a typed outcome."""

from gymlink.rollout.collect import Collector, OnRollout
from gymlink.rollout.figures import Figures, check_conservation, describe_failures, refuse_if_too_many_failed
from gymlink.rollout.metrics import batch_metrics
from gymlink.rollout.recorder import Recorder

__all__ = [
    "Collector",
    "Figures",
    "OnRollout",
    "Recorder",
    "batch_metrics",
    "check_conservation",
    "describe_failures",
    "refuse_if_too_many_failed",
]
