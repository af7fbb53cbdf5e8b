"""gymlink: train language-model agents in NeMo Gym environments with the trainer you already use.

The names here are the public ones; everything else may move between minor versions.
"""

from gymlink.errors import GymlinkError
from gymlink.hookspecs import EngineKind, EngineRequest, Framework, hookimpl
from gymlink.types import (
    ForkCause,
    Generation,
    Rollout,
    RolloutBatch,
    RolloutRequest,
    RolloutStatus,
    Sampling,
    Segment,
    Turn,
)

__version__ = "0.1.0"

__all__ = [
    "EngineKind",
    "EngineRequest",
    "ForkCause",
    "Framework",
    "Generation",
    "GymlinkError",
    "Rollout",
    "RolloutBatch",
    "RolloutRequest",
    "RolloutStatus",
    "Sampling",
    "Segment",
    "Turn",
    "hookimpl",
]
