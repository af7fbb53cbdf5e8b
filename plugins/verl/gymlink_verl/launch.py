"""The unmodified `python -m verl.trainer.main_ppo`, as a guarded program."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from gymlink.launch import run_trainer


def run_verl(
    overrides: Sequence[str],
    *,
    run_dir: Path,
    output: IO[bytes],
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Train with these Hydra overrides, of which `gymlink.run_dir` is `run_dir`; the rest is `run_trainer`'s."""
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides]
    run_trainer(command, name="verl", run_dir=run_dir, output=output, log=log, env=env, meanwhile=meanwhile)
