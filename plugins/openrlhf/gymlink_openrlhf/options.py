"""What the plugin reads from OpenRLHF's command line, in one place.

OpenRLHF hands an agent the sampling parameters and nothing else of its settings. Which estimator makes the advantages,
and which penalties change the rewards before, decides what reward of a failed rollout is neutral; so the flags are read
where Ray keeps them for every job: the command line of the process that started it.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gymlink.config import Settings
from gymlink.errors import ConfigError
from gymlink.types import Sampling

GROUP_RELATIVE = frozenset({"group_norm", "dr_grpo", "rloo", "reinforce_baseline"})
"""Estimators whose baseline is the group: a rollout that is alone scored in its group learns nothing there."""
AGENT_FLAG = "--train.agent_func"
ONE_SAMPLE = "OpenRLHF takes one sample for each rollout"


@dataclass(frozen=True, slots=True)
class Penalties:
    """What OpenRLHF takes off a reward before it makes advantages of it."""

    overlong_buffer_len: float | None = None
    overlong_penalty_factor: float = 1.0
    stop_properly_penalty_coef: float | None = None
    max_new_tokens: int = 0
    """The length that the overlong penalty is counted from."""

    @property
    def any(self) -> bool:
        return self.overlong_buffer_len is not None or self.stop_properly_penalty_coef is not None


@dataclass(frozen=True, slots=True)
class Options:
    """How this job trains. Read it with `read_options`."""

    estimator: str = "gae"
    prompts: int = 1024
    """Prompts that OpenRLHF trains on at a time, each with `siblings` rollouts."""
    siblings: int = 1
    filtering: tuple[float, float] | None = None
    """With dynamic filtering, the open interval in which a group's mean score must be."""
    penalties: Penalties = Penalties()

    @property
    def batch(self) -> int:
        return self.prompts * self.siblings


def command_line() -> Sequence[str]:
    """The arguments of the process that started this Ray job.

    Raises:
        ConfigError: they are not those of OpenRLHF's own program.
    """
    import ray

    # Private (Ray 2.55.0, which OpenRLHF 0.11.2 pins): no public name tells it without Ray's dashboard.
    from ray._private.state import jobs

    own = ray.get_runtime_context().get_job_id()
    line = next((job["Entrypoint"] for job in jobs() if job["JobID"] == own), "")
    if AGENT_FLAG not in line:
        raise ConfigError(
            f"gymlink reads OpenRLHF's flags from the command line of the job, and this one has no {AGENT_FLAG}: "
            f"{line!r}. Start openrlhf.cli.train_ppo_ray as a program, with its flags."
        )
    return split_entrypoint(line)


def split_entrypoint(line: str) -> Sequence[str]:
    """The arguments that Ray wrote as one line, with `subprocess.list2cmdline`: to that, an apostrophe is a letter."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.quotes, lexer.commenters = True, '"', ""
    return list(lexer)


def read_options(arguments: Sequence[str]) -> Options:
    """From OpenRLHF's flags; others are passed over.

    Raises:
        ConfigError: a flag asks for something that cannot work with rollouts from Gym.
    """
    try:
        given, _ = _parser().parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigError(f"OpenRLHF's command line: {error}.") from error
    flags: dict[str, Any] = vars(given)
    if flags["data.max_images_per_prompt"]:
        raise ConfigError(
            f"--data.max_images_per_prompt is {flags['data.max_images_per_prompt']}, and rollouts from Gym hold text "
            "only. Leave it out."
        )
    for name in ("reward.model_name_or_path", "reward.remote_url"):
        if flags[name]:
            raise ConfigError(
                f"--{name} is {flags[name]!r}, and with an agent OpenRLHF passes over it: the reward is Gym's. Leave "
                "it out; a judge is a server of the Gym environment."
            )
    filtering: tuple[float, float] | None = None
    if flags["algo.dynamic_filtering_enable"]:
        low, high = flags["algo.dynamic_filtering_range"]
        filtering = (low, high)
    return Options(
        estimator=flags["algo.advantage.estimator"],
        prompts=flags["rollout.batch_size"],
        siblings=flags["rollout.n_samples_per_prompt"],
        filtering=filtering,
        penalties=Penalties(
            flags["reward.overlong_buffer_len"],
            flags["reward.overlong_penalty_factor"],
            flags["reward.stop_properly_penalty_coef"],
            flags["rollout.max_new_tokens"] or flags["data.max_len"],
        ),
    )


def _parser() -> argparse.ArgumentParser:
    """The flags that matter here, with OpenRLHF's own defaults (0.11.2; a test compares them with its parser)."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--algo.advantage.estimator", default="gae")
    parser.add_argument("--algo.dynamic_filtering_enable", action="store_true")
    parser.add_argument("--algo.dynamic_filtering_range", nargs=2, type=float, default=(0, 1))
    parser.add_argument("--rollout.batch_size", type=int, default=1024)
    parser.add_argument("--rollout.n_samples_per_prompt", type=int, default=1)
    parser.add_argument("--rollout.max_new_tokens", type=int, default=None)
    parser.add_argument("--data.max_len", type=int, default=2048)
    parser.add_argument("--data.max_images_per_prompt", type=int, default=0)
    parser.add_argument("--reward.model_name_or_path", default=None)
    parser.add_argument("--reward.remote_url", default=None)
    parser.add_argument("--reward.overlong_buffer_len", type=float, default=None)
    parser.add_argument("--reward.overlong_penalty_factor", type=float, default=1.0)
    parser.add_argument("--reward.stop_properly_penalty_coef", type=float, default=None)
    return parser


def one_branch(settings: Settings) -> Settings:
    """The settings with which a rollout gives one sample: of a rewritten history, the branch that ends in the final
    response.

    Raises:
        ConfigError: gym.yaml asks for every branch.
    """
    alignment = settings.alignment
    if alignment.on_history_rewrite != "fork":
        return settings
    if "on_history_rewrite" in alignment.model_fields_set:
        raise ConfigError(
            f"alignment.on_history_rewrite is 'fork', which trains every branch of a rewritten history, and "
            f"{ONE_SAMPLE}. Leave it out, or set it to 'last' (the branch that ends in the final response) or 'mask'."
        )
    alignment = alignment.model_copy(update={"on_history_rewrite": "last"})
    return settings.model_copy(update={"alignment": alignment})


def sampling_of(params: Any) -> Sampling:
    """How OpenRLHF asks for this rollout to be sampled: `params` are vLLM's `SamplingParams`.

    Its `min_tokens` is left out: OpenRLHF's default of 1 would keep a turn from ending at once, with log probabilities
    that the trainer does not recompute.
    """
    return Sampling(
        temperature=float(params.temperature),
        top_p=float(params.top_p),
        top_k=max(0, int(params.top_k)),
        min_p=float(params.min_p),
        max_tokens=params.max_tokens,
    )
