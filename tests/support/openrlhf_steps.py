"""OpenRLHF's own steps from an agent's responses to advantages, without Ray and without a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from openrlhf_on_cpu import activate

activate()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what OpenRLHF 0.11.2 imports calls much of itself deprecated
    import openrlhf.trainer.ppo_trainer  # noqa: F401 - first, so that what it imports warns nowhere else
    import torch
    from openrlhf.trainer.ppo_utils.experience import Experience
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

torch.set_num_threads(1)

PAD = 0


def arguments(estimator: str, siblings: int, **flags: Any) -> SimpleNamespace:
    """OpenRLHF's arguments, as far as these steps read them; `flags` are some of `reward` and `rollout`."""
    advantage = {"estimator": estimator, "gamma": 1.0, "lambd": 1.0, "no_std_norm": False}
    reward = {"clip_range": None, "overlong_buffer_len": None, "stop_properly_penalty_coef": None}
    rollout = {"n_samples_per_prompt": siblings, "micro_batch_size": 3, "max_new_tokens": None}
    return SimpleNamespace(
        algo=SimpleNamespace(advantage=SimpleNamespace(**advantage)),
        reward=SimpleNamespace(**_known(reward | {"overlong_penalty_factor": 1.0}, flags)),
        rollout=SimpleNamespace(**_known(rollout, flags)),
        data=SimpleNamespace(max_len=2048),
        train=SimpleNamespace(dynamic_batch_enable=False),
    )


def _known(defaults: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: flags.get(name, value) for name, value in defaults.items()}


def generator() -> Any:
    """A `SamplesGenerator` with nothing in it."""
    return object.__new__(SamplesGenerator)


def read(response: Mapping[str, Any], max_length: int = 2048) -> Experience:
    """What the trainer makes of an agent's response."""
    return generator()._process_response_into_experience(response, max_len=max_length)


def with_advantages(
    responses: Sequence[Mapping[str, Any]],
    args: SimpleNamespace,
    values: Sequence[float] = (),
    *,
    max_length: int = 2048,
) -> list[Experience]:
    """The batch that is trained on, in its micro batches. No KL; `values` are the critic's, one for each response."""
    maker = object.__new__(RemoteExperienceMaker)
    maker.args = args
    maker.strategy = SimpleNamespace(args=args)
    maker.tokenizer = SimpleNamespace(pad_token_id=PAD)
    maker.advantage_estimator = args.algo.advantage.estimator
    maker.kl_ctl = SimpleNamespace(value=0.0)
    batch: list[Experience] = maker.split_rollout_samples([read(response, max_length) for response in responses])
    for one in batch:
        one.kl = torch.zeros(one.action_mask.shape)
        if values:
            one.values = torch.tensor([[values[at]] for at in one.index]).expand(one.action_mask.shape)
    return maker.compute_advantages_and_returns(batch)


def of_samples(batch: Sequence[Experience], field: str) -> list[list[float]]:
    """For each sample of a batch, a field at its action tokens."""
    return [
        getattr(one, field)[at][one.action_mask[at].bool()].tolist()
        for one in batch
        for at in range(len(one.sequences))
    ]
