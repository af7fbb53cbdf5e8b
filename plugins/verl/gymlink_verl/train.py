"""`gymlink train verl`: a run file with any of verl's own settings, checked whole, then verl's own `main_ppo`.

Files are checked before verl is imported. Then the whole configuration is composed, as `main_ppo` will compose it, and
what gymlink takes from it is checked with the rows and the model's tokenizer: before Ray, Gym or a model is started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from gymlink import runfile
from gymlink.align import Tokenizer, load_format
from gymlink.config import load_settings
from gymlink.errors import ConfigError, PluginError
from gymlink.gym import check_rows
from gymlink.hydra import hydra_override
from gymlink.launch import standard_output
from gymlink.report import Reporter
from gymlink_verl.launch import run_verl

OWN = ("gym_config", "train_file", "eval_file", "model_name_or_path", "output_dir", "max_turn_tokens")
"""Keys of a run file that are gymlink's own; all others are verl's."""
OUTPUT_DIR = "runs/verl"


def train(config: Path, arguments: Sequence[str]) -> None:
    """Train as the run file `config` says; `arguments` are Hydra overrides for verl and take precedence.

    Raises:
        ConfigError: the run file, or something that it names, cannot work; nothing was started or written.
        GymlinkError: Gym did not start, too many rollouts failed, or verl ended with an error.
    """
    folder = config.resolve().parent
    values = runfile.resolve_paths(runfile.read_run_file(config), folder)
    runfile.check_files(config, values)
    overrides = [*overrides_of(values), *arguments]
    reporter = Reporter(Console(stderr=True))
    reporter("loading verl")
    try:
        composed = compose(overrides)
        check(composed)
    finally:
        reporter.done()
    run_dir = Path(composed.gymlink.run_dir).expanduser().absolute()
    run_verl(overrides, run_dir=run_dir, output=standard_output())


def overrides_of(values: Mapping[str, Any]) -> list[str]:
    """The Hydra overrides that a run file stands for, its paths made absolute before.

    A key of verl's that verl's configuration does not have is written with a plus: `+ray_kwargs.ray_init.address`.
    """
    output = Path(values.get("output_dir") or OUTPUT_DIR).absolute()
    evaluates = values.get("eval_file") is not None
    own = {
        "gymlink.gym_config": str(values["gym_config"]),
        "gymlink.max_turn_tokens": values.get("max_turn_tokens"),
        "data.train_files": str(values["train_file"]),
        # verl reads a validation file also when it never validates.
        "data.val_files": str(values["eval_file"] if evaluates else values["train_file"]),
        "actor_rollout_ref.model.path": str(values["model_name_or_path"]),
        "trainer.default_local_dir": str(output),
        "hydra.run.dir": str(output / "hydra"),
    }
    if not evaluates:
        own |= {"trainer.val_before_train": False, "trainer.test_freq": -1}
    overrides = ["+gymlink=gym"]
    for path, value in own.items():
        overrides += hydra_override(path, value, how="")
    for key, value in values.items():
        if key not in OWN:
            how = key[: len(key) - len(key.lstrip("+"))]
            overrides += hydra_override(key.lstrip("+"), value, how=how)
    return overrides


def compose(overrides: Sequence[str]) -> Any:
    """verl's configuration with these overrides, as `main_ppo` composes it.

    Raises:
        ConfigError: an override that verl's configuration does not know, or a value that cannot work.
        PluginError: verl does not load gymlink's part of it.
    """
    from hydra.errors import HydraException

    try:
        # Hydra's own settings are for the program, not for the configuration.
        return _compose([one for one in overrides if not one.startswith("hydra.")])
    except HydraException as error:
        unknown = getattr(error.__cause__, "full_key", None)
        if unknown is None:
            raise ConfigError(f"verl's configuration: {' '.join(str(error).split())}") from error
        raise ConfigError(f"verl's configuration has no key {unknown!r} ({_hint(unknown)}).") from error


def _compose(overrides: Sequence[str]) -> Any:
    import verl  # noqa: F401 - loads verl's plugins, and with them +gymlink=gym
    from hydra import compose, initialize_config_module

    if "gymlink_verl.register" not in sys.modules:
        raise PluginError(
            "verl does not load gymlink's plugin (entry-point group verl.plugins). Is it excluded by the environment "
            f"variable VERL_USE_EXTERNAL_PLUGINS={os.environ.get('VERL_USE_EXTERNAL_PLUGINS', '')!r}? If not, install "
            "gymlink anew; python -c 'import gymlink_verl.register' says what is wrong with it."
        )
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", list(overrides))


def _hint(unknown: str) -> str:
    from omegaconf import DictConfig, OmegaConf

    folder, _, name = unknown.rpartition(".")
    base = _compose(["+gymlink=gym"])
    section = OmegaConf.select(base, folder) if folder else base
    known = list(section) if isinstance(section, DictConfig) else []
    nearest = get_close_matches(name, [str(key) for key in known], n=1, cutoff=0.6)
    if nearest:
        return f"did you mean {'.'.join(filter(None, [folder, nearest[0]]))!r}?"
    return f"to add it, write +{unknown}"


def check(config: Any) -> None:
    """Check a composed configuration, its rows and its tokenizer.

    Raises:
        ConfigError: what cannot work, before anything is started.
    """
    from verl.utils import hf_tokenizer

    from gymlink_verl.options import read_options

    settings = load_settings(config.gymlink.gym_config)
    model = config.actor_rollout_ref.model
    path = str(model.get("tokenizer_path") or model.path)
    try:
        tokenizer = hf_tokenizer(path, trust_remote_code=model.get("trust_remote_code", False))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot load the tokenizer of {path!r}: {str(error).strip().splitlines()[0]}") from error
    if model.get("custom_chat_template"):
        tokenizer.chat_template = model.custom_chat_template
    read_options(config, tokenizer.eos_token_id)
    load_format(cast("Tokenizer", tokenizer), name=settings.alignment.format)
    files = config.data.train_files
    rows = sum(sum(check_rows(file).values()) for file in ([files] if isinstance(files, str) else files))
    if rows < config.data.train_batch_size:
        raise ConfigError(
            f"There are {rows} rows to train on, and data.train_batch_size is {config.data.train_batch_size}: verl "
            "would train no step. Lower it, or give more rows."
        )
