"""gymlink's plugin for TRL: NeMo Gym rollouts in TRL's own GRPOTrainer.

    from gymlink_trl import GymRollout, gym_dataset, gym_reward

Importing the package imports neither torch nor trl; the names above do, when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gymlink_trl.dataset import gym_dataset
    from gymlink_trl.rollout import GymRollout, gym_reward

__all__ = ["GymRollout", "gym_dataset", "gym_reward"]

_HOMES = {"GymRollout": "rollout", "gym_dataset": "dataset", "gym_reward": "rollout"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
