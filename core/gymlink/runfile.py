"""The run file of `gymlink train`: a YAML mapping of a trainer's own settings and a few of gymlink's.

What is checked here needs no trainer, so it is said within seconds. Paths in the file are relative to its folder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from gymlink.config import load_settings
from gymlink.errors import ConfigError
from gymlink.gym import check_rows

PATHS = ("gym_config", "train_file", "eval_file", "output_dir")
"""Keys of every run file that are paths."""
REQUIRED = {
    "gym_config": "the gym.yaml with the environments",
    "train_file": "Gym rows (JSONL) to train on",
    "model_name_or_path": "a model's name or folder",
}
HUB_SEPARATORS = 1
"""A name on the Hugging Face hub is `owner/name`: what has more separators is a path."""


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


def resolve_paths(
    values: Mapping[str, Any], folder: Path, perhaps: Collection[str] = ("model_name_or_path",)
) -> dict[str, Any]:
    """The fields of a run file in `folder`, with the paths among them made independent of the working directory.

    `perhaps` are keys that may hold a path: they are taken as one when it exists.
    """

    def resolve(name: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        path = folder / Path(value).expanduser()
        return str(path) if name in PATHS or (name in perhaps and path.exists()) else value

    return {name: resolve(name, value) for name, value in values.items()}


def check_files(config: Path, values: Mapping[str, Any]) -> None:
    """Check the files that the fields of a run file name, after `resolve_paths`.

    Raises:
        ConfigError: a file is missing or cannot work, or a field that names one is left out.
    """
    for name, what in REQUIRED.items():
        if values.get(name) is None:
            raise ConfigError(f"{config}: the key {name!r} is missing: {what}.")
    load_settings(values["gym_config"])
    for name in ("train_file", "eval_file"):
        if values.get(name) is not None:
            check_rows(values[name])
    check_model(str(values["model_name_or_path"]), config.resolve().parent)


def check_model(name: str, folder: Path, *, what: str = "model_name_or_path") -> None:
    """A model that is looked for on the hub for a minute, when its folder was mistyped, helps nobody.

    Raises:
        ConfigError: the name is a path, relative to `folder` if at all, and nothing is there; `what` names the setting.
    """
    places = [folder / Path(name).expanduser(), Path(name).expanduser().absolute()]
    if any(place.exists() for place in places):
        return
    local = name.startswith(("/", ".", "~")) or name.count("/") > HUB_SEPARATORS
    if local or ("/" in name and places[0].parent.is_dir()):
        raise ConfigError(
            f"{what} is {name!r}, and there is no such folder: looked for {str(places[0])!r}. Give a folder that "
            "exists, or a model's name on the Hugging Face hub."
        )
