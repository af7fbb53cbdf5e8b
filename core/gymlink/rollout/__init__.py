"""Rollout orchestration: from rows to scored rollouts, concurrently, each with a deadline and a typed outcome."""

from gymlink.rollout.claims import Claims
from gymlink.rollout.collect import Collector, OnRollout
from gymlink.rollout.figures import Figures, check_conservation, describe_failures, refuse_if_too_many_failed
from gymlink.rollout.metrics import batch_metrics
from gymlink.rollout.neutral import NeutralRewards, neutral_rewards
from gymlink.rollout.recorder import Recorder, recorded_segments, recorded_turns
from gymlink.rollout.siblings import Group, Siblings

__all__ = [
    "Claims",
    "Collector",
    "Figures",
    "Group",
    "NeutralRewards",
    "OnRollout",
    "Recorder",
    "Siblings",
    "batch_metrics",
    "check_conservation",
    "describe_failures",
    "neutral_rewards",
    "recorded_segments",
    "recorded_turns",
    "refuse_if_too_many_failed",
]
