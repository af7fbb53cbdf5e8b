"""The hooks by which a plugin makes a trainer, or an engine, known. All of a plugin's contract is in this file.

A plugin is a module (or object) that implements some of these with `@gymlink.hookimpl`, registered under the
entry-point group `gymlink`. The built-in plugins use the same hooks as a stranger's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from gymlink.types import Sampling

if TYPE_CHECKING:
    from gymlink.demo import DemoRequest, DemoResult
    from gymlink.engines import Engine

hookspec = pluggy.HookspecMarker("gymlink")
hookimpl = pluggy.HookimplMarker("gymlink")


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
    """`f(request: gymlink.demo.DemoRequest) -> gymlink.demo.DemoResult`: train the demo environment."""
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


@hookspec
def gymlink_engines() -> Sequence[EngineKind]:
    """Name the kinds of engine that this plugin brings."""
    raise NotImplementedError


@hookspec
def gymlink_frameworks() -> Sequence[Framework]:
    """Name the trainers that this plugin connects."""
    raise NotImplementedError


EngineFunction = Callable[[EngineRequest], "Engine"]
TrainFunction = Callable[[Path, Sequence[str]], None]
DemoFunction = Callable[["DemoRequest"], "DemoResult"]
PathFunction = Callable[[Path, Path], Path]
PromptsFunction = Callable[[Path, Path, bool], Path]
