"""Enters the rollout and the weights' way into verl's registries; what they name is imported when it is asked for."""

from __future__ import annotations

from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

NAME = "on_cpu"


def _replica() -> type[RolloutReplica]:
    from verl_on_cpu.replica import CpuReplica

    return CpuReplica


RolloutReplicaRegistry.register(NAME, _replica)
# verl 0.9.1 has no function to register the worker's half of a rollout; this table of names is what it looks in.
_ROLLOUT_REGISTRY[(NAME, "async")] = "verl_on_cpu.replica.CpuServerAdapter"
