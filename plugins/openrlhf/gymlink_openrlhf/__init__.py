"""gymlink for OpenRLHF: its rollout actors collect in NeMo Gym, through `--train.agent_func_path`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gymlink_openrlhf.executor import executor_for

__all__ = ["executor_for"]


def __getattr__(name: str) -> Any:
    """Import what needs OpenRLHF when it is asked for: the command line only asks what there is."""
    if name == "executor_for":
        from gymlink_openrlhf.executor import executor_for

        return executor_for
    raise AttributeError(name)
