"""Makes OpenRLHF known to gymlink. Imports neither torch nor openrlhf."""

from __future__ import annotations

from collections.abc import Sequence

from gymlink.hookspecs import Framework, hookimpl


@hookimpl
def gymlink_frameworks() -> Sequence[Framework]:
    return [
        Framework(
            name="openrlhf",
            distribution="openrlhf",
            versions=">=0.11.2,<0.12",
            extra="openrlhf",
            summary="OpenRLHF's train_ppo_ray, sampling from the vLLM engines that OpenRLHF runs",
            train="gymlink_openrlhf.train:train",
            demo="gymlink_openrlhf.demo:run",
            path="gymlink_openrlhf.agent:write_agent",
            prompts="gymlink_openrlhf.prompts:write_prompts",
        )
    ]
