"""The hooks by which a plugin makes a trainer, or an engine, known. All of a plugin's contract is in this file.

A plugin is a module (or object) that implements some of these with `@gymlink.hookimpl`, registered under the
entry-point group `gymlink`. The built-in plugins use the same hooks as a stranger's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pluggy

from gymlink.types import Sampling

hookspec = pluggy.HookspecMarker("gymlink")
hookimpl = pluggy.HookimplMarker("gymlink")

ENDS = 5
"""`reward_first` and `reward_last` are means over this many steps."""
IN_NO_SUMMARY = ("rewards", "least_rise", "least_reward")
"""Of a result's fields: the curve is in `metrics.jsonl`, and what must hold is not measured."""


@dataclass(frozen=True, slots=True)
class Framework:
    """One trainer, described without importing it.

    `distribution` and `versions` say what must be installed ("trl", ">=1.16,<2"); `extra` is the name in
    `pip install "gymlink[extra]"`. `train`, `demo`, `path` and `prompts` are dotted paths ("package.module:function"),
    imported only when used.
    """

    name: str
    distribution: str
    versions: str
    extra: str
    summary: str
    train: str
    """`f(config: Path, arguments: Sequence[str]) -> None`: run the trainer's own loop from one run file."""
    demo: str | None = None
    """`f(request: DemoRequest) -> DemoResult`: train the demo environment."""
    path: str | None = None
    """`f(gym: Path, run_dir: Path) -> Path`: write the file that the trainer's own command line names to be given
    rollouts from Gym. For a trainer that finds its extensions by such a file."""
    prompts: str | None = None
    """`f(rows: Path, output: Path, evaluation: bool) -> Path`: write Gym rows as a file of prompts. For a trainer that
    takes no Gym rows as they are."""
    switch: str | None = None
    """How rollouts from Gym are switched on in the trainer's own way, in a few words, where no file is needed."""


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One kind of engine that `gymlink serve` can put behind the gateway, described without importing it."""

    name: str
    summary: str
    make: str
    """`f(request: EngineRequest) -> gymlink.engines.Engine`, called on the event loop that the gateway runs on."""
    remote: bool = False
    """Whether it samples on servers that run already, whose addresses it must be given."""
    extra: str | None = None
    """The name in `pip install "gymlink[extra]"` of what it needs beside the core."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What an engine is made of.

    `model` is the name or folder of the policy; `urls` are the servers of a remote engine; `max_context` is in tokens,
    the engine's own limit when None; `reply` is what a scripted engine says.
    """

    model: str
    tokenizer: Any
    sampling: Sampling
    urls: tuple[str, ...] = ()
    api_key: str | None = None
    max_context: int | None = None
    reply: str | None = None


@dataclass(frozen=True, slots=True)
class DemoRequest:
    """What a plugin's demo is asked to do.

    It trains the `keypad` environment found under `environments`, leaves `rollouts.jsonl` in `output`, tells
    `report` what it waits for, calls `on_start` with the number of steps when training begins and `on_step` after
    each with that step's figures ("step" and "reward" at least). `arguments` are options of the trainer, in the
    trainer's own form; a demo refuses those that it cannot use.
    """

    output: Path
    environments: Path
    steps: int | None
    report: Callable[[str], None]
    on_start: Callable[[int], None]
    on_step: Callable[[Mapping[str, float]], None]
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What a plugin's demo measured. `rewards` has the mean reward of each step; times are in seconds.

    `max_logprob_error` and `max_prob_error` are the largest differences between a token's log probability, or its
    probability, as sampled and as the trainer recomputes it; `mean_logprob_error` is the largest mean of a step's
    (signed) differences of log probabilities. Each is None where a trainer does not tell it; one must be there.

    The demo has succeeded only if the reward rises, to `least_rise` times what it was and to `least_reward` at least.
    """

    framework: str
    framework_version: str
    gym_version: str
    environment: str
    steps: int
    rollouts: int
    failed: int
    rewards: Sequence[float]
    prefix_breaks: int
    tokens_sampled: int
    tokens_trained: int
    tokens_dropped: int
    max_logprob_error: float | None
    max_prob_error: float | None
    seconds_train: float
    mean_logprob_error: float | None = None
    least_rise: float = 1.0
    least_reward: float = 0.0

    @property
    def reward_first(self) -> float:
        return fmean(self.rewards[:ENDS])

    @property
    def reward_last(self) -> float:
        return fmean(self.rewards[-ENDS:])

    def summary(self, seconds_setup: float) -> dict[str, object]:
        """The content of `summary.json`."""
        figures = {name: value for name, value in asdict(self).items() if name not in IN_NO_SUMMARY}
        return figures | {
            "reward_first": self.reward_first,
            "reward_last": self.reward_last,
            "seconds_setup": round(seconds_setup, 2),
        }


@hookspec
def gymlink_engines() -> Sequence[EngineKind]:
    """Name the kinds of engine that this plugin brings."""
    raise NotImplementedError


@hookspec
def gymlink_frameworks() -> Sequence[Framework]:
    """Name the trainers that this plugin connects."""
    raise NotImplementedError
