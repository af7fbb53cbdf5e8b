"""Rollout orchestration: from rows to scored rollouts, concurrently, each with a deadline and a typed outcome."""

from gymlink.rollout.collect import Collector
from gymlink.rollout.metrics import batch_metrics
from gymlink.rollout.recorder import Recorder

__all__ = ["Collector", "Recorder", "batch_metrics"]
