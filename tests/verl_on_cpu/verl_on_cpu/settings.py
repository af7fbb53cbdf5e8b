"""The Hydra config group `+verl_on_cpu=on`: what a CPU run needs to differ in from verl's defaults, and nothing else.

It is merged after verl's own configuration and before the command line, which wins. The sizes suit a tiny model and two
cores. `data.train_batch_size` is one mini-batch, in every trainer mode, unless the command line says otherwise. The
parts of `separate_async` (a rollout node, a checkpoint engine, a step of 1) stay unused in the other modes.
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore

from verl_on_cpu.registry import NAME

_FSDP: dict[str, Any] = {
    "strategy": "fsdp2",
    "model_dtype": "fp32",
    "use_torch_compile": False,
    "mixed_precision": {"param_dtype": "fp32"},
}
_MODEL: dict[str, Any] = {
    "use_remove_padding": False,  # packing needs flash attention
    "enable_gradient_checkpointing": False,
    "override_config": {"attn_implementation": "eager"},
}

ON: dict[str, Any] = {
    # The legacy trainer takes a checkpoint engine other than "naive" for a rollout on other machines.
    "verl_on_cpu": {"weights": {"True": NAME, "False": "naive"}},
    "ray_kwargs": {
        "ray_init": {
            "address": "local",  # never a cluster that happens to run on this machine
            "num_cpus": 12,  # logical, as are the GPUs: what verl's actors reserve, with room for a few more
            "num_gpus": 4,
            "include_dashboard": False,
            "object_store_memory": 300_000_000,
        }
    },
    "trainer": {
        "device": "cpu",
        "nnodes": 1,
        "n_gpus_per_node": 1,
        "logger": ["console"],
        "val_before_train": False,
        "resume_mode": "disable",
        "v1": {"separate_async": {"parameter_sync_step": 1}},
    },
    "data": {"train_batch_size": 4, "val_batch_size": 4, "dataloader_num_workers": 0, "filter_overlong_prompts": False},
    "actor_rollout_ref": {
        "model": _MODEL,
        "actor": {
            "strategy": "fsdp2",
            "ppo_mini_batch_size": "${data.train_batch_size}",
            "use_dynamic_bsz": True,  # micro-batches by tokens: any number of sequences will do
            "use_torch_compile": False,
            "fsdp_config": _FSDP,
        },
        # verl offloads a forward-only model to pinned memory, which there is none of; any other gets an optimizer.
        "ref": {
            "fsdp_config": {**_FSDP, "forward_only": False},
            "optim": {"_target_": "verl.workers.config.FSDPOptimizerConfig", "lr": 0.0},
        },
        "rollout": {
            "name": NAME,
            "dtype": "float32",
            "nnodes": 1,
            "n_gpus_per_node": 1,
            "tensor_model_parallel_size": 1,
            "free_cache_engine": False,
            "checkpoint_engine": {
                "backend": "${oc.select:verl_on_cpu.weights.${trainer.use_v1}}",
                "custom_backend_module": "verl_on_cpu.weights",
            },
            "agent": {"num_workers": 1},
        },
    },
    "critic": {
        "strategy": "fsdp2",
        "model": {**_MODEL, "path": "${actor_rollout_ref.model.path}"},
        "fsdp": _FSDP,
    },
    "reward": {"num_workers": 1},
    "transfer_queue": {
        "backend": {"SimpleStorage": {"num_data_storage_units": 1, "total_storage_size": 10_000}},
    },
}

ConfigStore.instance().store(group="verl_on_cpu", name="on", package="_global_", node=ON)
