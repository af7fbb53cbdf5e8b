"""Two jobs, one after the other in one process; in each, several processes ask for the job's actor at the same moment.

python two_jobs.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray

from gymlink.errors import ConfigError
from gymlink_ray.job import Job

ASKERS = 3


@ray.remote(num_cpus=1)
class Asker:
    """A process of the job."""

    def ask(self, options: dict[str, str]) -> tuple[str, str]:
        return answer(options)


def answer(options: dict[str, str]) -> tuple[str, str]:
    """Which actor is the job's, and what waiting for Gym ends with."""
    job = Job.of(**options)
    try:
        job.wait()
    except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
        return repr(job.actor), f"{_kind(error)}: {error}"
    return repr(job.actor), "it runs"


def _kind(error: Exception) -> str:
    """Ray raises what is both its own error and the one that the actor raised."""
    return "ConfigError" if isinstance(error, ConfigError) else type(error).__name__


def run_job(folder: Path, number: int) -> dict[str, Any]:
    ray.init(address="local", num_cpus=ASKERS, include_dashboard=False)
    options = {"gym_config": f"{folder}/gym.yaml", "run_dir": f"{folder}/gym{number}"}
    askers = [Asker.remote() for _ in range(ASKERS)]
    answers = [*ray.get([asker.ask.remote(options) for asker in askers]), answer(options)]
    noted = (folder / f"gym{number}" / "error.txt").read_text()
    ray.shutdown()
    return {"actors": sorted({actor for actor, _ in answers}), "said": [said for _, said in answers], "noted": noted}


def main(folder: Path) -> None:
    told = [run_job(folder, number) for number in range(2)]
    (folder / "told.tmp").write_text(json.dumps(told))
    (folder / "told.tmp").rename(folder / "told.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
