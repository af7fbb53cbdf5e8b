"""What the plugin needs of TRL (1.10 to 1.16) and transformers (5.19 and later), by name.

A new version that lacks one fails here first. The plugin uses no private name of either but one; some of the names
below are public and undocumented.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import trl
from packaging.specifiers import SpecifierSet
from transformers import ContinuousBatchingConfig, GenerationMixin
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput

import gymlink_trl
from gymlink.plugins import find_framework, load_plugins, resolve
from gymlink_trl import GymRollout, gym_reward
from gymlink_trl.quiet import NO_REWARD, TRL_LOGGER

PACKAGE = Path(gymlink_trl.__file__).parent

TRAINER_ATTRIBUTES = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_completion_length",
    "tools",
}
"""Set by GRPOTrainer.__init__ (TRL 1.10 to 1.16), beside those of transformers' Trainer."""

CONFIG_FIELDS = {
    "use_vllm",
    "repetition_penalty",
    "generation_kwargs",
    "chat_template_kwargs",
    "transformers_continuous_batching_config",
    "seed",
    "output_dir",
    "generation_batch_size",
    "num_generations",
}
BATCHING_FIELDS = {
    "return_logprobs",
    "seed",
    "auto_switch_to_flash",
    "allow_block_sharing",
    "use_cuda_graph",
    "max_memory_percent",
    "page_size",
    "max_batch_tokens",
    "num_blocks",
}


def test_the_framework_is_known_and_its_version_supported() -> None:
    assert load_plugins().failures == {}
    framework = find_framework("trl")
    assert SpecifierSet(framework.versions).contains(version("trl"))
    assert callable(resolve(framework.train))
    assert framework.demo is not None
    assert callable(resolve(framework.demo))


def test_listing_frameworks_imports_none() -> None:
    script = (
        "import sys; from gymlink.plugins import load_plugins; assert 'trl' in load_plugins().frameworks;"
        "import gymlink_trl; print([m for m in ('torch', 'trl', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_trainer_has_what_is_read_from_it() -> None:
    source = inspect.getsource(trl.GRPOTrainer.__init__)
    assert {name for name in TRAINER_ATTRIBUTES if f"self.{name} =" not in source} == set()
    assert {field.name for field in dataclasses.fields(trl.GRPOConfig)} >= CONFIG_FIELDS
    assert "rollout_func" in inspect.signature(trl.GRPOTrainer.__init__).parameters


def test_what_reward_functions_are_given() -> None:
    source = inspect.getsource(trl.GRPOTrainer)
    for name in inspect.signature(gym_reward).parameters:
        assert name == "_" or name.startswith("gym_") or f'reward_kwargs["{name}"]' in source
    assert 'extra_fields.pop("env_mask"' in source


def test_a_row_without_a_reward_is_said_where_it_is_silenced() -> None:
    module = sys.modules[trl.GRPOTrainer.__module__]
    assert module.logger.name == TRL_LOGGER
    assert f'logger.warning(\n                f"{NO_REWARD}' in inspect.getsource(module)


def test_the_rollout_function_is_called_with_prompts_and_trainer() -> None:
    assert list(inspect.signature(GymRollout.__call__).parameters) == ["self", "prompts", "trainer"]
    assert "self.rollout_func(prompts, self)" in inspect.getsource(trl.GRPOTrainer)


def test_continuous_batching_has_what_the_engine_uses() -> None:
    assert {field.name for field in dataclasses.fields(ContinuousBatchingConfig)} >= BATCHING_FIELDS
    assert callable(GenerationMixin.init_continuous_batching)
    for name in ("warmup", "start", "stop", "is_running", "add_request", "cancel_request", "get_result"):
        assert callable(getattr(ContinuousBatchingManager, name))
    source = inspect.getsource(ContinuousBatchingManager.__init__)
    assert "self.continuous_batching_config =" in source
    assert "self.background_thread_status =" in source
    assert {"request_id", "generated_tokens", "logprobs", "error"} <= {
        field.name for field in dataclasses.fields(GenerationOutput)
    }


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_no_private_name_of_another_package_is_used(path: Path) -> None:
    """Attributes that start with an underscore are read from `self` only, but for the one named here."""
    allowed = {"_attn_implementation"}  # the attention that a transformers config was resolved to
    private = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in {"self", "period"})
    }
    assert private <= allowed
