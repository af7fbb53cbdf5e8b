"""`gymlink train trl`, once `gymlink_trl.launch` has checked the files: any field of TRL's GRPOConfig and ModelConfig.

The run file is read by TRL's own parser; fields can be overridden on the command line as TRL has it. Everything that
can be wrong with the file, its settings, its rows and the model's chat format is found before anything is started or
written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn, cast, get_args

from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config, get_quantization_config

from gymlink.align import Tokenizer, load_format
from gymlink.config import Settings, load_settings
from gymlink.errors import ConfigError
from gymlink.report import Reporter
from gymlink.runfile import read_run_file, resolve_paths
from gymlink_trl.dataset import gym_dataset
from gymlink_trl.options import OPTIONAL_PATHS
from gymlink_trl.quiet import quiet_trainer
from gymlink_trl.rollout import Check, GymRollout, gym_reward
from gymlink_trl.support import check_arguments, check_row_count, freeze_garbage


@dataclass
class GymArguments:
    """The fields of a run file that are gymlink's own."""

    gym_config: str = field(metadata={"help": "The gym.yaml: environments, rollouts, alignment, gateway."})
    train_file: str = field(metadata={"help": "Gym rows (JSONL) to train on."})
    eval_file: str | None = field(default=None, metadata={"help": "Gym rows (JSONL) to evaluate on."})
    check_logprobs: Check = field(
        default="first",
        metadata={"help": "Compare sampled logprobs with a plain forward pass: after no, the first or all batches."},
    )
    max_turn_tokens: int | None = field(
        default=None, metadata={"help": "Tokens that the policy may sample in one turn."}
    )


ARGUMENTS = (GymArguments, GRPOConfig, ModelConfig)


@dataclass(frozen=True, slots=True)
class Run:
    """A run file, read and checked."""

    gym: GymArguments
    training: GRPOConfig
    model: ModelConfig
    settings: Settings
    tokenizer: PreTrainedTokenizerBase
    train_rows: Dataset
    eval_rows: Dataset | None


def train(config: Path, arguments: Sequence[str]) -> None:
    """Train as the run file `config` says, with command-line `arguments` taking precedence.

    Raises:
        ConfigError: the run file, or something that it names, cannot work; nothing was started or written.
        PluginError: a setting of the trainer cannot work with gymlink.
        GymlinkError: Gym did not start, or too many rollouts failed.
    """
    quiet_trainer()
    run = prepare(config, arguments)
    console = Console(stderr=True, quiet=run.training.process_index != 0)
    reporter = Reporter(console)
    with GymRollout(
        run.settings, check_logprobs=run.gym.check_logprobs, max_turn_tokens=run.gym.max_turn_tokens
    ) as rollout:
        reporter(f"loading {run.model.model_name_or_path}")
        try:
            trainer = make_trainer(run, rollout)
        finally:
            reporter.done()
        rollout.prepare(trainer)
        freeze_garbage()
        trainer.train(resume_from_checkpoint=run.training.resume_from_checkpoint)
        trainer.save_model(run.training.output_dir)
        console.print(f"Model saved to {run.training.output_dir}", highlight=False, markup=False, soft_wrap=True)
        if run.training.push_to_hub:
            trainer.push_to_hub()
        if hasattr(trainer, "end"):  # transformers 5.18 and later: close trackers and the process group
            trainer.end()


def prepare(config: Path, arguments: Sequence[str]) -> Run:
    """Read and check all that a run file names. Raises as `train` does."""
    gym, training, model = parse(config, arguments)
    if gym.check_logprobs not in get_args(Check):
        raise ConfigError(f"check_logprobs is {gym.check_logprobs!r}; choose one of {', '.join(get_args(Check))}.")
    check_arguments(training)
    if gym.eval_file is None and training.eval_strategy != "no":
        raise ConfigError(
            f"eval_strategy is {str(training.eval_strategy)!r}, and there is no eval_file to evaluate on."
        )
    if gym.eval_file is not None and training.eval_strategy == "no":
        raise ConfigError(f"eval_file is {gym.eval_file!r}, and nothing evaluates: set eval_strategy and eval_steps.")
    settings = load_settings(gym.gym_config)
    train_rows = gym_dataset(gym.train_file)
    check_row_count(len(train_rows), training)
    eval_rows = gym_dataset(gym.eval_file) if gym.eval_file is not None else None
    tokenizer = _load_tokenizer(model, training)
    load_format(cast("Tokenizer", tokenizer), name=settings.alignment.format)
    return Run(gym, training, model, settings, tokenizer, train_rows, eval_rows)


def parse(config: Path, arguments: Sequence[str]) -> tuple[GymArguments, GRPOConfig, ModelConfig]:
    """The fields of a run file and of the command line, as TRL's own parser reads them.

    Raises:
        ConfigError: not a YAML mapping, an unknown key (with the nearest known one), or a value that cannot work.
    """
    values = read_run_file(config)
    for name, value in (values.pop("env", None) or {}).items():
        os.environ[name] = str(value)
    _refuse_unknown(values, where=str(config))
    parser = _Parser(ARGUMENTS, prog="gymlink train trl")
    parser.set_defaults_with_config(**resolve_paths(values, config.resolve().parent, OPTIONAL_PATHS))
    try:
        gym, training, model, rest = parser.parse_args_into_dataclasses(list(arguments), return_remaining_strings=True)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{config}: {error}") from error
    _refuse_unknown([one.removeprefix("--") for one in rest if one.startswith("--")], where="on the command line")
    if rest:
        raise ConfigError(f"On the command line: {' '.join(rest)!r} belongs to no option.")
    return gym, training, model


def make_trainer(run: Run, rollout: GymRollout) -> GRPOTrainer:
    """TRL's own trainer, as its own script makes it, with rollouts and rewards from Gym."""
    run.training.model_init_kwargs = {
        "revision": run.model.model_revision,
        "attn_implementation": run.model.attn_implementation,
        "dtype": run.model.dtype,
        **(run.training.model_init_kwargs or {}),
    }
    return GRPOTrainer(
        model=run.model.model_name_or_path,
        reward_funcs=gym_reward,
        args=run.training,
        train_dataset=run.train_rows,
        eval_dataset=run.eval_rows,
        processing_class=run.tokenizer,
        quantization_config=get_quantization_config(run.model),
        peft_config=get_peft_config(run.model),
        rollout_func=rollout,
    )


class _Parser(TrlParser):  # type: ignore[misc]
    def error(self, message: str) -> NoReturn:
        # argparse would print the usage of some two hundred options and leave.
        raise ConfigError(f"{message[:1].upper()}{message[1:]}.")


def _refuse_unknown(keys: Iterable[str], *, where: str) -> None:
    known = [one.name for arguments in ARGUMENTS for one in fields(arguments) if one.init]
    for key in keys:
        if key not in known:
            nearest = get_close_matches(str(key), known, n=1, cutoff=0.6)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "see trl.GRPOConfig and trl.ModelConfig for all"
            raise ConfigError(f"{where}: unknown key {key!r} ({hint})")


def _load_tokenizer(model: ModelConfig, training: GRPOConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            trust_remote_code=training.trust_remote_code,
            padding_side="left",
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"Cannot load the tokenizer of {model.model_name_or_path!r}: {reason}") from error
    return tokenizer
