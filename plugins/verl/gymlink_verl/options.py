"""What the plugin reads from verl's settings, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gymlink.config import Settings
from gymlink.errors import ConfigError
from gymlink.types import Sampling
from gymlink_verl.convert import Shape

GROUP_RELATIVE = frozenset(
    {"grpo", "grpo_vectorized", "grpo_passk", "gdpo", "rloo", "rloo_vectorized", "opo", "gpg"}
    | {"reinforce_plus_plus_baseline", "optimal_token_baseline", "tir_optimal_token_baseline"}
)
"""Estimators whose baseline is the group. verl gives a rollout that is alone in its group its bare reward as
advantage, or none at all: it teaches nothing that the others could be compared with."""
COUNT_A_ROLLOUT_ONCE = frozenset({"grpo", "gae"})
"""Estimators under which verl's V1 trainer counts a rollout of several rows once: with the others, each row of it would
be in the baseline."""
COUNT_A_ROW_ONCE = frozenset({"seq-mean-token-mean"})
"""Loss aggregations under which each row has the same weight, however few tokens it has."""


@dataclass(frozen=True, slots=True)
class Options:
    """How rollouts are collected for this job. Read it with `read_options`."""

    v1: bool
    group_relative: bool
    one_row: bool
    shape: Shape
    max_context: int
    max_turn_tokens: int
    siblings: Mapping[str, int]
    """How many rollouts verl makes of a prompt, by split."""

    def apply(self, settings: Settings) -> Settings:
        """`fork` is `last` where several rows of a rollout would count it several times, or cannot be taken."""
        if not self.one_row or settings.alignment.on_history_rewrite != "fork":
            return settings
        alignment = settings.alignment.model_copy(update={"on_history_rewrite": "last"})
        return settings.model_copy(update={"alignment": alignment})


def read_options(config: Any, eos: int | None) -> Options:
    """From verl's whole configuration; `eos` is the id of the tokenizer's end-of-sequence token.

    Raises:
        ConfigError: a setting that cannot work with rollouts from Gym.
    """
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    if eos is None:
        raise ConfigError("The tokenizer has no eos_token, which ends what the policy says; give it one.")
    if not rollout.calculate_log_probs:
        raise ConfigError(
            "actor_rollout_ref.rollout.calculate_log_probs is False, and what is trained must have the logprobs it was "
            "sampled with. Leave it as +gymlink=gym sets it."
        )
    reward_model = config.reward.reward_model
    if reward_model.enable and not reward_model.enable_resource_pool:
        raise ConfigError(
            "reward.reward_model.enable is True: verl would put that model's score in the place of Gym's reward. Leave "
            "it out; a judge is a server of the Gym environment."
        )
    v1 = bool(config.trainer.use_v1)
    estimator = str(config.algorithm.adv_estimator)
    shape = Shape(int(rollout.prompt_length), int(rollout.response_length), eos, padded=not v1)
    given = (config.get("gymlink") or {}).get("max_turn_tokens")
    return Options(
        v1=v1,
        group_relative=estimator in GROUP_RELATIVE,
        one_row=not v1 or estimator not in COUNT_A_ROLLOUT_ONCE or actor.loss_agg_mode in COUNT_A_ROW_ONCE,
        shape=shape,
        max_context=int(rollout.get("max_model_len") or shape.prompt_length + shape.response_length),
        max_turn_tokens=int(given or shape.response_length),
        siblings={"train": int(rollout.n), "val": int(rollout.val_kwargs.n)},
    )


def sampling_of(params: Mapping[str, Any], max_tokens: int) -> Sampling:
    """How verl asks for this rollout to be sampled; its own values for training and validation differ."""
    return Sampling(
        temperature=float(params["temperature"]),
        top_p=float(params["top_p"]),
        top_k=max(0, int(params["top_k"])),
        max_tokens=max_tokens,
    )
