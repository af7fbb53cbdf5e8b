"""Ray with GPUs that are only numbers, on this machine alone; and what the environment must say before the libraries
that read it are imported.

OpenRLHF calls `ray.init()` without resources, and its placement asks for a GPU for every model and engine: here they
are logical, and nothing is behind them.
"""

from __future__ import annotations

import functools
import os
from typing import Any

CLUSTER = {
    "address": "local",  # never a cluster that happens to run on this machine
    "num_cpus": 8,
    "num_gpus": 8,
    "include_dashboard": False,
    "object_store_memory": 256 << 20,
}

ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray announces, in every process, a change of how it hides GPUs
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_COMPILE_DISABLE": "1",  # or vLLM has a C++ compiler make a faster way to rank log-probabilities
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's process does the work itself, as it does with a GPU
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
}


def set_environment() -> None:
    """For this process and those it starts; what is set already wins."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def mend_ray(ray: Any) -> None:
    """`ray.init()` starts `CLUSTER`, unless RAY_ADDRESS or the call names another."""
    init = ray.init

    @functools.wraps(init)
    def init_here(address: str | None = None, **settings: Any) -> Any:
        if address is None and "RAY_ADDRESS" not in os.environ:
            return init(**{**CLUSTER, **settings})
        return init(address, **settings)

    ray.init = init_here
