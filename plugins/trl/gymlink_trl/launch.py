"""`gymlink train trl`, before torch is imported: what can be wrong with the files of a run is said within seconds.

The run file is read here, with the command-line options that name a file. Whatever does not need TRL's own fields to
be judged is checked here; `gymlink_trl.train`, which takes half a minute to import on a small machine, does the rest.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from gymlink import runfile
from gymlink.errors import ConfigError
from gymlink.report import Reporter
from gymlink_trl.options import OPTIONAL_PATHS


def train(config: Path, arguments: Sequence[str]) -> None:
    """Check the files, import the trainer, and train. Raises as `gymlink_trl.train.train` does."""
    check_files(config, arguments)
    reporter = Reporter(Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0"))
    reporter("loading TRL")
    try:
        from gymlink_trl.train import train as train_checked
    finally:
        reporter.done()
    train_checked(config, arguments)


def check_files(config: Path, arguments: Sequence[str]) -> None:
    """Check the run file and the files that it and the command-line `arguments` name, without importing torch.

    Raises:
        ConfigError: a file is missing or cannot work, or a field that names one is left out.
    """
    values = runfile.resolve_paths(runfile.read_run_file(config), config.resolve().parent, OPTIONAL_PATHS)
    runfile.check_files(config, {**values, **_named_files(arguments)})


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"On the command line: {message}.")


def _named_files(arguments: Sequence[str]) -> dict[str, str]:
    """The options of the command line that name a file or a model, under either of the spellings that TRL takes."""
    options = _Options(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in ("gym_config", "train_file", "eval_file", "model_name_or_path"):
        options.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    return vars(options.parse_known_args(list(arguments))[0])
