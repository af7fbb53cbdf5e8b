"""What `+gymlink=gym` sets in verl's own configuration, composed by Hydra as `main_ppo` composes it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf
from verl.utils.config import validate_config
from verl.utils.dataset.rl_dataset import get_dataset_class
from verl.utils.import_utils import load_extern_type

from gymlink_verl.dataset import GymDataset
from gymlink_verl.loop import GymAgentLoop
from gymlink_verl.register import AGENT_LOOP
from gymlink_verl.sampler import gym_sampler
from gymlink_verl.train import compose

pytestmark = pytest.mark.filterwarnings("ignore:.*load_extern_type:FutureWarning")  # verl 0.9.1 calls its own so

GYM = "+gymlink=gym"


@pytest.fixture(scope="module")
def config() -> Any:
    return compose([GYM, "gymlink.gym_config=mine.yaml", "trainer.default_local_dir=/runs/mine"])


def test_verl_finds_what_it_names(config: Any) -> None:
    assert get_dataset_class(config.data) is GymDataset
    custom = config.trainer.v1.sampler.custom_sampler
    assert load_extern_type(custom.path, custom.name) is gym_sampler
    agent = config.actor_rollout_ref.rollout.agent
    assert agent.default_agent_loop == AGENT_LOOP
    [entry] = OmegaConf.load(agent.agent_loop_config_path)
    assert entry.name == AGENT_LOOP
    assert get_class(entry._target_) is GymAgentLoop


def test_each_part_is_given_what_it_needs(config: Any) -> None:
    """verl gives the dataset and the sampler only their own sections, resolved or not."""
    mine = {"gym_config": "mine.yaml", "run_dir": "/runs/mine/gym", "max_turn_tokens": None}
    sampler_kwargs = config.trainer.v1.sampler.sampler_kwargs
    for given in (config.gymlink, config.data.gymlink, sampler_kwargs.gymlink):
        assert {key: given[key] for key in given} == mine
    assert sampler_kwargs.train_batch_size == config.data.train_batch_size
    assert sampler_kwargs.filter_groups == config.algorithm.filter_groups
    assert sampler_kwargs.gen_batch_size is None
    assert config.actor_rollout_ref.rollout.calculate_log_probs is True
    assert config.actor_rollout_ref.actor.shuffle is True


def test_the_command_line_wins() -> None:
    config = compose(
        [
            "gymlink.run_dir=/elsewhere",
            "actor_rollout_ref.actor.shuffle=false",
            "data.custom_cls.name=Mine",
            "trainer.v1.sampler.custom_sampler.path=mine.py",
            "data.train_batch_size=3",
            GYM,
        ]
    )
    assert config.gymlink.run_dir == config.data.gymlink.run_dir == "/elsewhere"
    assert config.actor_rollout_ref.actor.shuffle is False
    assert config.data.custom_cls.name == "Mine"
    assert config.trainer.v1.sampler.custom_sampler.path == "mine.py"
    assert config.trainer.v1.sampler.sampler_kwargs.train_batch_size == 3


def test_nothing_else_of_verl_is_changed(config: Any) -> None:
    """Every other leaf of the configuration is as verl has it."""
    plain = _leaves(compose(["trainer.default_local_dir=/runs/mine"]))
    changed = {key for key, value in _leaves(config).items() if key not in plain or plain[key] != value}
    own = ("gymlink.", "data.gymlink.", "data.custom_cls.", "trainer.v1.sampler.custom_sampler.")
    own += ("trainer.v1.sampler.sampler_kwargs.", "actor_rollout_ref.rollout.agent.")
    assert {key for key in changed if not key.startswith(own)} - {"data.gymlink"} == {"actor_rollout_ref.actor.shuffle"}


def _leaves(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, item in node.items():
                walk(item, f"{path}.{key}" if path else str(key))
        else:
            found[path] = node

    walk(OmegaConf.to_container(config, resolve=False), "")
    return found


def test_verls_own_check_accepts_it() -> None:
    gpus = ["trainer.n_gpus_per_node=1", "data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8"]
    sizes = ["actor_rollout_ref.actor.use_dynamic_bsz=true", "critic.use_dynamic_bsz=true"]
    logprobs = ["actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true"]
    validate_config(config=compose([GYM, *gpus, *sizes, *logprobs]), use_reference_policy=False, use_critic=False)


def test_verl_loads_it_by_entry_point() -> None:
    [found] = [one for one in entry_points(group="verl.plugins") if one.name == "gymlink"]
    assert found.value == "gymlink_verl.register"


def test_importing_it_imports_nothing_heavy() -> None:
    """It runs in each of a job's processes while verl itself is half imported."""
    heavy = ("torch", "verl", "ray", "transformers", "gymlink.config", "gymlink.gym", "gymlink.errors", "pydantic")
    script = f"import sys, gymlink_verl.register; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path("/"))
    assert done.stdout.strip() == "[]"
