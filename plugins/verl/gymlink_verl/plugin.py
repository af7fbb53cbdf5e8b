"""Makes verl known to gymlink. Imports neither torch nor verl."""

from __future__ import annotations

from collections.abc import Sequence

from gymlink.hookspecs import Framework, hookimpl


@hookimpl
def gymlink_frameworks() -> Sequence[Framework]:
    return [
        Framework(
            name="verl",
            distribution="verl",
            versions=">=0.9.1,<0.10",
            extra="verl",
            summary="verl's main_ppo, sampling from the rollout servers that verl runs (vLLM, SGLang and others)",
            train="gymlink_verl.train:train",
            demo="gymlink_verl.demo:run",
            switch="+gymlink=gym on your launch command",
        )
    ]
