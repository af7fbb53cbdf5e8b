"""Makes TRL known to gymlink. Imports neither torch nor trl."""

from __future__ import annotations

from collections.abc import Sequence

from gymlink.hookspecs import Framework, hookimpl


@hookimpl
def gymlink_frameworks() -> Sequence[Framework]:
    return [
        Framework(
            name="trl",
            distribution="trl",
            versions=">=1.10,<1.17",
            extra="trl",
            summary="TRL's GRPOTrainer, sampling from the trainer's own live model",
            train="gymlink_trl.launch:train",
            demo="gymlink_trl.demo:run",
            switch='rollout_func=GymRollout("gym.yaml") in your GRPOTrainer',
        )
    ]
