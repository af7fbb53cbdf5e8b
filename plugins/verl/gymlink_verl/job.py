"""The one Gym of a verl job (`gymlink_ray.job`), as verl's settings ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gymlink.errors import ConfigError
from gymlink_ray.job import Job


def job_of(options: Mapping[str, Any] | None) -> Job:
    """The job's handle; `options` is the node `gymlink` of verl's settings.

    Raises:
        ConfigError: there is no such node, or gym.yaml cannot be read or cannot work.
    """
    if options is None:
        raise ConfigError("verl's configuration has no gymlink.gym_config: add +gymlink=gym to the command line.")
    return Job.of(options["gym_config"], options["run_dir"])
