"""What the plugin reads from verl's own configuration, composed as `main_ppo` composes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import AdvantageEstimator

from gymlink.config import AlignmentSettings, GymSettings, Settings
from gymlink.errors import ConfigError
from gymlink.types import Sampling
from gymlink_verl.convert import Shape
from gymlink_verl.options import COUNT_A_ROLLOUT_ONCE, GROUP_RELATIVE, Options, read_options, sampling_of

Compose = Callable[..., Any]
EOS = 2
PER_ROW = "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"


def read(composed: Compose, *overrides: str) -> Options:
    return read_options(composed(*overrides), EOS)


@pytest.mark.parametrize(
    ("overrides", "one_row"),
    [
        (["algorithm.adv_estimator=grpo"], False),
        (["algorithm.adv_estimator=gae"], False),
        (["algorithm.adv_estimator=rloo"], True),
        (["algorithm.adv_estimator=grpo_passk"], True),
        (["algorithm.adv_estimator=reinforce_plus_plus"], True),
        (["algorithm.adv_estimator=grpo", PER_ROW], True),
        (["algorithm.adv_estimator=grpo", "trainer.use_v1=false"], True),
        (["algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum"], False),
    ],
)
def test_a_rollout_is_one_row_where_several_would_count_it_several_times(
    composed: Compose, overrides: list[str], one_row: bool
) -> None:
    options = read(composed, *overrides)
    assert options.one_row is one_row
    settings = Settings(gym=GymSettings(config_paths=["a.yaml"]))
    assert settings.alignment.on_history_rewrite == "fork"
    assert options.apply(settings).alignment.on_history_rewrite == ("last" if one_row else "fork")
    masked = settings.model_copy(update={"alignment": AlignmentSettings(on_history_rewrite="mask")})
    assert options.apply(masked) is masked, "a choice that makes one row anyway stays"


@pytest.mark.parametrize("name", [one.value for one in AdvantageEstimator])
def test_each_estimator_of_verl_is_placed(composed: Compose, name: str) -> None:
    """A new one must be looked at: is its baseline the group?"""
    alone = {"gae", "reinforce_plus_plus", "remax"}
    assert (name in GROUP_RELATIVE) != (name in alone)
    assert read(composed, f"algorithm.adv_estimator={name}").group_relative is (name not in alone)


def test_the_names_are_verls() -> None:
    assert {one.value for one in AdvantageEstimator} >= COUNT_A_ROLLOUT_ONCE


def test_lengths(composed: Compose) -> None:
    lengths = ["data.max_prompt_length=30", "data.max_response_length=50"]
    options = read(composed, *lengths)
    assert options.shape == Shape(30, 50, EOS, padded=False)
    assert (options.max_context, options.max_turn_tokens) == (80, 50)
    options = read(composed, *lengths, "actor_rollout_ref.rollout.max_model_len=200", "gymlink.max_turn_tokens=16")
    assert (options.max_context, options.max_turn_tokens) == (200, 16)
    assert read(composed, "trainer.use_v1=false").shape.padded


def test_siblings(composed: Compose) -> None:
    options = read(composed, "actor_rollout_ref.rollout.n=4", "actor_rollout_ref.rollout.val_kwargs.n=2")
    assert options.siblings == {"train": 4, "val": 2}


def test_it_reads_a_configuration_without_gymlinks_part(composed: Compose) -> None:
    """`main_ppo` with an agent loop configuration of one's own."""
    config = composed()
    OmegaConf.set_struct(config, False)
    config.pop("gymlink")
    assert read_options(config, EOS).max_turn_tokens == config.actor_rollout_ref.rollout.response_length


def test_what_cannot_work(composed: Compose) -> None:
    with pytest.raises(ConfigError, match="no eos_token"):
        read_options(composed(), None)
    with pytest.raises(ConfigError, match=r"calculate_log_probs is False.*\+gymlink=gym"):
        read(composed, "actor_rollout_ref.rollout.calculate_log_probs=false")


def test_how_verl_samples() -> None:
    params = {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
    assert sampling_of(params, 7) == Sampling(0.5, 0.9, 0, max_tokens=7)
    assert sampling_of({**params, "temperature": 0, "top_k": 20}, 7) == Sampling(0.0, 0.9, 20, max_tokens=7)


def test_a_reward_model_in_the_place_of_gyms_reward_is_refused(composed: Compose) -> None:
    with pytest.raises(ConfigError, match=r"reward_model\.enable is True: .* in the place of Gym's reward"):
        read(composed, "reward.reward_model.enable=true")
    read(composed, "reward.reward_model.enable=true", "reward.reward_model.enable_resource_pool=true")
