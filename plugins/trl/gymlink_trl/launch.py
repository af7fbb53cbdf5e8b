"""`gymlink train trl`, before torch is imported: what can be wrong with the files of a run is said within seconds.

The run file is read here, with the command-line options that name a file. Whatever does not need TRL's own fields to
be judged is checked here; `gymlink_trl.train`, which takes half a minute to import on a small machine, does the rest.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from rich.console import Console

from gymlink.config import load_settings
from gymlink.errors import ConfigError
from gymlink.gym import check_rows
from gymlink.report import Reporter

PATHS = ("gym_config", "train_file", "eval_file", "output_dir")
"""Fields that are paths: in a run file, relative to its own folder."""
PERHAPS_PATHS = ("model_name_or_path", "resume_from_checkpoint", "deepspeed")
"""Fields that may be a path: relative to the run file's folder when it is there."""
REQUIRED = {
    "gym_config": "the gym.yaml with the environments",
    "train_file": "Gym rows (JSONL) to train on",
    "model_name_or_path": "a model's name or folder",
}
HUB_SEPARATORS = 1
"""A name on the Hugging Face hub is `owner/name`: what has more separators is a path."""


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
    folder = config.resolve().parent
    values = {**resolve_paths(read_run_file(config), folder), **_named_files(arguments)}
    for name, what in REQUIRED.items():
        if values.get(name) is None:
            raise ConfigError(f"{config}: the key {name!r} is missing: {what}.")
    load_settings(values["gym_config"])
    for name in ("train_file", "eval_file"):
        if values.get(name) is not None:
            check_rows(values[name])
    _check_model(str(values["model_name_or_path"]), folder)


def read_run_file(config: Path) -> dict[str, Any]:
    """The fields of a run file, as they stand there.

    Raises:
        ConfigError: the file cannot be read, or is not a YAML mapping.
    """
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the run file {str(config)!r}: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{config}: expected a mapping with the key 'gym_config', got {type(values).__name__}.")
    return values


def resolve_paths(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of a run file in `folder`, with the paths among them made independent of the working directory."""

    def resolve(name: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        path = folder / Path(value).expanduser()
        return str(path) if name in PATHS or (name in PERHAPS_PATHS and path.exists()) else value

    return {name: resolve(name, value) for name, value in values.items()}


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"On the command line: {message}.")


def _named_files(arguments: Sequence[str]) -> dict[str, str]:
    """The options of the command line that name a file or a model, under either of the spellings that TRL takes."""
    options = _Options(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in ("gym_config", "train_file", "eval_file", "model_name_or_path"):
        options.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    return vars(options.parse_known_args(list(arguments))[0])


def _check_model(name: str, folder: Path) -> None:
    """A model that is looked for on the hub for a minute, when its folder was mistyped, helps nobody."""
    places = [folder / Path(name).expanduser(), Path(name).expanduser().absolute()]
    if any(place.exists() for place in places):
        return
    local = name.startswith(("/", ".", "~")) or name.count("/") > HUB_SEPARATORS
    if local or ("/" in name and places[0].parent.is_dir()):
        raise ConfigError(
            f"model_name_or_path is {name!r}, and there is no such folder: looked for {str(places[0])!r}. Give a "
            "folder that exists, relative to the run file's, or a model's name on the Hugging Face hub."
        )
