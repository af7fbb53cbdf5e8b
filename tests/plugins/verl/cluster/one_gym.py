"""A job whose Gym is up, and that then waits to be told to end: by a file, or by a signal.

python one_gym.py FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import ray

from gymlink_ray.job import Job


def main(folder: Path) -> None:
    ray.init(address="local", num_cpus=1, include_dashboard=False)
    gym = Job.of(f"{folder}/gym.yaml", f"{folder}/gym").wait()
    (folder / "told.tmp").write_text(json.dumps(sorted(gym.agents)))
    (folder / "told.tmp").rename(folder / "told.json")
    while not (folder / "end").exists():
        time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
