"""`gymlink train openrlhf`: a run file with any of OpenRLHF's own flags, checked, then OpenRLHF's `train_ppo_ray`.

What can be wrong with rows, gym.yaml, model and tokenizer, or between them and the flags, is said before Ray, Gym or a
model is started. The flags themselves are OpenRLHF's to judge, which it does first of all.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from rich.console import Console

from gymlink import runfile
from gymlink.align import Tokenizer, load_format
from gymlink.config import load_settings
from gymlink.errors import ConfigError
from gymlink.gym import check_rows
from gymlink.launch import standard_output
from gymlink.report import Reporter
from gymlink_openrlhf.agent import AGENT_FILE, write_agent
from gymlink_openrlhf.launch import run_openrlhf
from gymlink_openrlhf.options import one_branch, read_options
from gymlink_openrlhf.prompts import INPUT_KEY, LABEL_KEY, check_path, write_prompts

OWN = ("gym_config", "train_file", "eval_file", "model_name_or_path", "output_dir")
"""Keys of a run file that are gymlink's own; all others are OpenRLHF's."""
OUTPUT_DIR = "runs/openrlhf"


@dataclass(frozen=True, slots=True)
class Run:
    """A run file's paths, all absolute, and the flags that it stands for."""

    gym_config: Path
    train_file: Path
    eval_file: Path | None
    model: str
    output: Path
    run_dir: Path
    flags: Sequence[str]

    @classmethod
    def of(cls, values: Mapping[str, Any], arguments: Sequence[str]) -> Run:
        """From the values of a run file, its paths resolved, and `arguments`, which take precedence."""
        output = Path(values.get("output_dir") or OUTPUT_DIR).absolute()
        return cls(
            Path(values["gym_config"]),
            Path(values["train_file"]),
            Path(values["eval_file"]) if values.get("eval_file") else None,
            str(values["model_name_or_path"]),
            output,
            output / "gym",
            [*flags_of({key: value for key, value in values.items() if key not in OWN}), *arguments],
        )

    @property
    def prompts(self) -> Path:
        return self.run_dir / "prompts.jsonl"

    @property
    def eval_prompts(self) -> Path:
        return self.run_dir / "eval-prompts.jsonl"

    @property
    def arguments(self) -> list[str]:
        """The whole command line of `train_ppo_ray`. What is given again counts the last time."""
        own = {
            "actor.model_name_or_path": self.model,
            "train.agent_func_path": str(self.run_dir / AGENT_FILE),
            "data.prompt_dataset": str(self.prompts),
            "data.input_key": INPUT_KEY,
            "data.label_key": LABEL_KEY,
            "eval.dataset": str(self.eval_prompts) if self.eval_file else None,
            "ckpt.output_dir": str(self.output / "model"),
            "ckpt.path": str(self.output / "checkpoints"),
        }
        return [*flags_of(own), *self.flags]


def train(config: Path, arguments: Sequence[str]) -> None:
    """Train as the run file `config` says; `arguments` are flags of OpenRLHF and take precedence.

    Raises:
        ConfigError: the run file, or something that it names, cannot work; nothing was started.
        GymlinkError: Gym did not start, too many rollouts failed, or OpenRLHF ended with an error.
    """
    values = runfile.resolve_paths(runfile.read_run_file(config), config.resolve().parent)
    runfile.check_files(config, values)
    run = Run.of(values, arguments)
    check(run)
    start(run)


def start(run: Run, **more: Any) -> None:
    """Write what OpenRLHF reads, and run it; `more` is for `run_openrlhf`."""
    write_agent(run.gym_config, run.run_dir)
    write_prompts(run.train_file, run.prompts)
    if run.eval_file is not None:
        write_prompts(run.eval_file, run.eval_prompts, evaluation=True)
    run_openrlhf(run.arguments, run_dir=run.run_dir, **{"output": standard_output(), **more})


def flags_of(values: Mapping[str, Any]) -> list[str]:
    """The flags that OpenRLHF's own keys of a run file stand for, nested or dotted.

    True is the bare flag; what is false or null is left out; a list is several values.

    Raises:
        ConfigError: a key is no text.
    """
    return [word for name, value in _leaves(values) for word in _words(name, value)]


def _leaves(values: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigError(f"The run file's key {before}{key!r} is no text: write the name of a flag of OpenRLHF.")
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield before + key, value


def _words(name: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    flag = f"--{name}"
    if value is True:
        return [flag]
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    # One word: a value that begins with a dash, such as -1e-3, would be taken for a flag.
    return [f"{flag}={value}"]


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"OpenRLHF's flags: {message}.")


def check(run: Run) -> None:
    """Check what would otherwise fail after models and servers have been started.

    Raises:
        ConfigError: rows, gym.yaml, flags or tokenizer cannot work, alone or together.
    """
    flags = _given(run.arguments)
    engines = flags["vllm.num_engines"]
    if not engines:
        raise ConfigError(
            f"--vllm.num_engines is {engines}, and the rollouts are sampled from OpenRLHF's vLLM engines: give at "
            "least 1."
        )
    for prompts in [run.prompts, *([run.eval_prompts] if run.eval_file else [])]:
        check_path(prompts)
    rows = min(sum(check_rows(run.train_file).values()), flags["data.max_samples"])
    if rows < flags["rollout.batch_size"]:
        raise ConfigError(
            f"There are {rows} rows to train on, and --rollout.batch_size is {flags['rollout.batch_size']}: OpenRLHF "
            "would train on less than a batch. Lower it, or give more rows."
        )
    settings = one_branch(load_settings(run.gym_config))
    reporter = Reporter(Console(stderr=True))
    reporter("loading the tokenizer")
    try:
        read_options(run.arguments)
        _check_tokenizer(flags["actor.model_name_or_path"], settings.alignment.format)
    finally:
        reporter.done()


def _given(arguments: Sequence[str]) -> dict[str, Any]:
    """What is checked of OpenRLHF's flags, with its own defaults (0.11.2; a test compares them with its parser)."""
    parser = _Flags(add_help=False)
    parser.add_argument("--actor.model_name_or_path")
    parser.add_argument("--vllm.num_engines", type=int, default=None)
    parser.add_argument("--rollout.batch_size", type=int, default=1024)
    parser.add_argument("--data.max_samples", type=int, default=int(1e8))
    return vars(parser.parse_known_args(list(arguments))[0])


def _check_tokenizer(model: str, chat_format: str | None) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)  # as OpenRLHF does
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot load the tokenizer of {model!r}: {str(error).strip().splitlines()[0]}") from error
    load_format(cast("Tokenizer", tokenizer), name=chat_format)
