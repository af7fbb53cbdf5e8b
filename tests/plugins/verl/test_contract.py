"""What the plugin needs of verl (0.9.1), by name and by what it does.

A new version that lacks one fails here first. The plugin uses no private name of verl; some of these are public and
undocumented.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.config_store import ConfigStore
from packaging.specifiers import SpecifierSet
from transformers import PreTrainedTokenizerBase
from verl.experimental.agent_loop.agent_loop import (
    AgentLoopBase,
    AgentLoopMetrics,
    AgentLoopOutput,
    AgentLoopWorker,
    DictConfigWrap,
)
from verl.protocol import DataProto
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

import gymlink_verl
from gymlink.plugins import find_framework
from gymlink_verl.sampler import EMPTY

PACKAGE = Path(gymlink_verl.__file__).parent
CHANGED = f"the plugin was written for verl 0.9.1, and this is {version('verl')}"


def test_the_framework_is_known_and_its_version_supported() -> None:
    framework = find_framework("verl")
    assert SpecifierSet(framework.versions).contains(version("verl"))


async def test_an_agent_loop_has_what_is_read_from_it(
    composed: Callable[..., Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    class Loop(AgentLoopBase):
        async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
            raise NotImplementedError

    config, client = composed(), object()
    data = DictConfigWrap(config.data)
    loop = Loop(DictConfigWrap(config), client, tokenizer, None, RLHFDataset, data, hf_model_type=None)
    assert loop.config is config, CHANGED
    assert loop.tokenizer is tokenizer, CHANGED
    assert loop.server_manager is client, CHANGED


def test_what_a_server_answers() -> None:
    assert {"token_ids", "log_probs", "routed_experts", "stop_reason", "extra_fields"} <= set(TokenOutput.model_fields)
    parameters = inspect.signature(LLMServerClient.generate).parameters
    assert {"request_id", "prompt_ids", "sampling_params"} <= set(parameters), CHANGED


def test_what_an_agent_loop_gives() -> None:
    assert set(AgentLoopOutput.model_fields) >= {
        "prompt_ids",
        "response_ids",
        "response_mask",
        "response_logprobs",
        "routed_experts",
        "reward_score",
        "num_turns",
        "metrics",
        "extra_fields",
    }, CHANGED
    assert {"generate_sequences", "tool_calls"} <= set(AgentLoopMetrics.model_fields), CHANGED


class Sessions:
    """A prompt that verl's own V1 worker runs, with a stand-in where it makes agent loops, and without Ray."""

    def __init__(self, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tags: list[str] = []
        self.given: list[dict[str, Any]] = []
        self.begun_before_an_end = 0
        kind = agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class
        self.worker = object.__new__(kind)
        self.worker.config = config
        self.worker._run_agent_loop = self._run_agent_loop
        monkeypatch.setattr(agent_loop_tq, "tq", self)

    async def async_kv_put(self, *, tag: dict[str, str], **_: Any) -> None:
        self.tags.append(tag["status"])

    async def _run_agent_loop(
        self, sampling_params: dict[str, Any], *, trajectory: Any, trace: bool, **given: Any
    ) -> None:
        self.given.append(given)
        await asyncio.sleep(0)
        self.begun_before_an_end = self.begun_before_an_end or len(self.given)
        if given.get("fails") == given["session_id"]:
            raise RuntimeError("as told")

    async def run(self, **prompt: Any) -> None:
        sample = {"uid": "u", "index": 3, "global_steps": 2, **prompt}
        await self.worker._run_prompt(sample, {}, trajectory={"validate": False})


async def test_v1_runs_the_siblings_of_a_prompt_together(
    composed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for each other, which would be for ever if one began only when another has ended."""
    sessions = Sessions(composed("actor_rollout_ref.rollout.n=5"), monkeypatch)
    await sessions.run()
    assert sessions.begun_before_an_end == 5, CHANGED
    assert [given["session_id"] for given in sessions.given] == list(range(5)), CHANGED
    assert all(given.items() >= {"uid": "u", "index": 3, "global_steps": 2}.items() for given in sessions.given), (
        CHANGED
    )
    assert sessions.tags == ["running", "finished"], CHANGED


async def test_v1_takes_a_group_as_failed_when_one_sibling_raises(
    composed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = Sessions(composed("actor_rollout_ref.rollout.n=3"), monkeypatch)
    await sessions.run(fails=1)
    assert sessions.tags == ["running", "failure"], CHANGED
    assert len(sessions.given) == 3, CHANGED


async def test_v1_takes_no_row_as_an_answer(monkeypatch: pytest.MonkeyPatch, composed: Callable[..., Any]) -> None:
    sessions = Sessions(composed(), monkeypatch)
    await sessions.worker._agent_loop_postprocess([], False, uid="u", session_id=0)
    assert sessions.tags == []


def test_the_legacy_trainer_tells_the_agent_loop_whose_sibling_a_rollout_is() -> None:
    """By its uid; it is known as the legacy trainer's by having no session_id."""
    fields = {name: np.array([name], dtype=object) for name in ("uid", "index", "gym_row", "gym_split", "data_source")}
    batch = DataProto.from_single_dict({**fields, "dummy_tensor": torch.zeros(1, 1)})
    gen_batch = RayPPOTrainer._get_gen_batch(object.__new__(RayPPOTrainer), batch)
    assert {"uid", "index", "gym_row", "gym_split"} <= set(gen_batch.non_tensor_batch), CHANGED
    source = inspect.getsource(AgentLoopWorker.generate_sequences)
    assert "session_id" not in source, CHANGED
    assert "batch.non_tensor_batch.items()" in source, CHANGED
    assert "asyncio.gather" in source, CHANGED


def test_v1_counts_a_rollout_of_several_rows_once_under_grpo() -> None:
    """The last row speaks for its rollout, and the others get what it gets; `COUNT_A_ROLLOUT_ONCE` relies on it."""
    rewards = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    batch = DataProto.from_dict(
        tensors={"token_level_rewards": rewards, "response_mask": torch.ones(4, 1)},
        non_tensors={"uid": np.array(["u"] * 4, dtype=object)},
    )
    keys = ["u_0_0", "u_0_1", "u_0_2", "u_1_0"]
    made = compute_advantage_for_multi_trajectories(batch, batch_keys=keys, adv_estimator="grpo")
    first, *others, last = made.batch["advantages"].squeeze(-1).tolist()
    assert [first, *others] == pytest.approx([0.70710] * 3, abs=1e-3), CHANGED
    assert last == pytest.approx(-0.70710, abs=1e-3), CHANGED


def test_the_replay_buffers_take_what_they_are_given() -> None:
    needed = {
        "trainer_mode",
        "trainer_config",
        "max_off_policy_threshold",
        "max_off_policy_strategy",
        "sampler_kwargs",
        "poll_interval",
        "refill_fn",
        "filter_groups_metric",
        "train_batch_size",
        "gen_batch_size",
        "max_inflight_gen_batches",
        "sync_refill_failed_groups",
    }
    for kind in (ReplayBuffer, ReplayBufferAsync):
        assert needed == set(inspect.signature(kind.__init__).parameters) - {"self"}, CHANGED
        assert {"global_steps", "partition_id", "batch_size"} <= set(inspect.signature(kind.sample).parameters), CHANGED
    assert EMPTY in inspect.getsource(ReplayBuffer.sample), CHANGED
    assert issubclass(ReplayBufferAsync, ReplayBuffer)


def test_the_settings_that_are_read_exist(composed: Callable[..., Any]) -> None:
    """Without gymlink's own part; a name that is gone raises here and not after an hour."""
    config = composed()
    assert {"path", "name"} <= set(config.trainer.v1.sampler.custom_sampler), CHANGED
    assert config.trainer.use_v1 is True, f"V1 is the default. {CHANGED}"
    for name in (
        "n",
        "prompt_length",
        "response_length",
        "max_model_len",
        "calculate_log_probs",
        "agent",
        "val_kwargs",
    ):
        assert name in config.actor_rollout_ref.rollout, CHANGED
    for name in ("train_files", "val_files", "train_batch_size", "custom_cls"):
        assert name in config.data, CHANGED
    assert "adv_estimator" in config.algorithm, CHANGED
    assert "loss_agg_mode" in config.actor_rollout_ref.actor, CHANGED
    assert "default_local_dir" in config.trainer, CHANGED


def test_verl_has_loaded_the_config_group() -> None:
    assert ConfigStore.instance().list("gymlink") == ["gym.yaml"], CHANGED


def test_the_trainer_makes_its_replay_buffer_before_its_workers() -> None:
    """Gym starts with the sampler or the dataset, so that it comes up while verl loads the model."""
    source = inspect.getsource(PPOTrainer.__init__)
    assert "self.replay_buffer = self._build_replay_buffer()" in source, CHANGED


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_no_private_name_of_another_package_is_used(path: Path) -> None:
    private = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"})
    }
    assert private == set()
