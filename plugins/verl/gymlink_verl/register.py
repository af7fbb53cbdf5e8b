"""What `import verl` runs of gymlink (entry-point group `verl.plugins`): the Hydra config group `+gymlink=gym`.

It runs in every process of a job, while verl itself is being imported, so it only tells Hydra a few settings: the rest
of gymlink is imported where one of them is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

AGENT_LOOP = "gymlink"
"""The name of the agent loop, in agent_loop.yaml."""

GROUP: dict[str, Any] = {
    "gymlink": {
        # The environments.
        "gym_config": "gym.yaml",
        # Logs of Gym's servers and rollouts.jsonl.
        "run_dir": "${trainer.default_local_dir}/gym",
        # Tokens that the policy may sample in one turn; data.max_response_length bounds all turns together.
        "max_turn_tokens": None,
    },
    "data": {
        "custom_cls": {"path": "pkg://gymlink_verl.dataset", "name": "GymDataset"},
        # The dataset and the sampler are given a part of the settings only.
        "gymlink": "${gymlink}",
    },
    "actor_rollout_ref": {
        "rollout": {
            "calculate_log_probs": True,
            "agent": {
                "default_agent_loop": AGENT_LOOP,
                "agent_loop_config_path": str(Path(__file__).resolve().parent / "agent_loop.yaml"),
            },
        },
        # A rewritten history makes more rows than ppo_mini_batch_size foresees, and verl fills up with empty ones:
        # shuffled, they do not all fall into one mini-batch.
        "actor": {"shuffle": True},
    },
    "trainer": {
        "v1": {
            "sampler": {
                "custom_sampler": {"path": "pkg://gymlink_verl.sampler", "name": "gym_sampler"},
                "sampler_kwargs": {
                    "gymlink": "${gymlink}",
                    "rollout_n": "${actor_rollout_ref.rollout.n}",
                    "filter_groups": "${oc.select:algorithm.filter_groups,null}",
                    "train_batch_size": "${data.train_batch_size}",
                    "gen_batch_size": "${oc.select:data.gen_batch_size,null}",
                    "sync_refill_failed_groups": "${trainer.v1.sampler.sync_refill_failed_groups}",
                },
            }
        }
    },
}

ConfigStore.instance().store(group="gymlink", name="gym", node=GROUP, package="_global_", provider="gymlink")
