"""What the unmodified `python -m openrlhf.cli.train_ppo_ray` needs to train on a machine without a GPU.

    PYTHONPATH=.../tests/openrlhf_on_cpu python -m openrlhf.cli.train_ppo_ray --ds.attn_implementation=sdpa ...

That one variable is all: `sitecustomize` beside this package then calls `activate` in every process of the run, and the
process that imports `openrlhf` gets the stand-ins below, each when the module that it mends has been imported. Weights,
tokens and log-probabilities are computed by the real DeepSpeed and the real vLLM; only what asks for CUDA is replaced.
Made against OpenRLHF 0.11.2, DeepSpeed 0.19.6 and vLLM 0.29.0.

OPENRLHF_ON_CPU_RECORD serves tests (see `recorder`). Programs that import OpenRLHF without having been started that way
call `activate` themselves, before the import.
"""

from __future__ import annotations

from openrlhf_on_cpu.imports import after_import


def activate() -> None:
    """Let OpenRLHF train on a CPU in this process and in those it starts, from its import on. Once is enough."""
    after_import("openrlhf", _mend_all)


def _mend_all(_: object) -> None:
    from openrlhf_on_cpu import cluster

    cluster.set_environment()  # first: torch, which the others import, reads some of it

    from openrlhf_on_cpu import device, generation, recorder, training

    device.hide_flash_attention()
    for name, mend in {
        "deepspeed": training.mend_deepspeed,
        "openrlhf.trainer.ray.ppo_actor": recorder.record_actor,
        "openrlhf.trainer.ray.ppo_critic": recorder.record_critic,
        "openrlhf.trainer.ray.vllm_worker_wrap": generation.mend_worker,
        "ray": cluster.mend_ray,
        "torch": device.mend_torch,
        "vllm.distributed.device_communicators.pynccl": generation.mend_nccl,
        "vllm.model_executor.layers.utils": generation.mend_layers,
    }.items():
        after_import(name, mend)
