"""What the unmodified `python -m verl.trainer.main_ppo` needs to train on a machine without a GPU.

    PYTHONPATH=.../tests/verl_on_cpu VERL_USE_EXTERNAL_MODULES=verl_on_cpu \\
        python -m verl.trainer.main_ppo +verl_on_cpu=on actor_rollout_ref.model.path=... data.train_files=...

verl imports this package while `import verl` runs, in every process. It enters verl's registries a platform, a rollout
replica that generates with transformers, and a way for weights to travel; and Hydra a config group with every setting
that a CPU run needs. Values on the command line win over that group. Made against verl 0.9.1.

Two environment variables serve tests: VERL_ON_CPU_RECORD (see `recorder`) and VERL_ON_CPU_ROUTED_EXPERTS (see
`server`).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Read by this process and by those it starts. The first holds also on a machine that has a GPU; the second keeps Ray
# from announcing, in every process, a change of how it hides GPUs; the third keeps a test off the network.
os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

if "MASTER_PORT" in os.environ and "WG_PREFIX" in os.environ:
    # A worker of verl's: its group meets in a file, not at the port that verl chose for it. verl frees that port long
    # before the worker binds it, and on a machine that runs everything some other connection may have taken it by then.
    _meeting = f"verl-{os.environ['WG_PREFIX']}-{os.environ['MASTER_PORT']}".replace("/", "_")
    _folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    os.environ["DIST_INIT_METHOD"] = (_folder / _meeting).as_uri()  # what verl hands to init_process_group

from verl_on_cpu import device, registry, settings  # noqa: F401 - imported to be registered
