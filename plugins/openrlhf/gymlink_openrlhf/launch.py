"""The unmodified `python -m openrlhf.cli.train_ppo_ray`, as a guarded program."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from gymlink.launch import run_trainer


def run_openrlhf(
    flags: Sequence[str],
    *,
    run_dir: Path,
    output: IO[bytes],
    log: Path | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Train with these flags; `run_dir` is the folder that the agent file among them names. See `run_trainer`."""
    command = [sys.executable, "-m", "openrlhf.cli.train_ppo_ray", *flags]
    run_trainer(command, name="OpenRLHF", run_dir=run_dir, output=output, log=log, meanwhile=meanwhile)
