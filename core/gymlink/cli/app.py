"""`gymlink`: the commands, and how an error becomes one clear message with the right exit status."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from gymlink import __version__
from gymlink.cli.serve import serve
from gymlink.errors import ConfigError, GymlinkError, GymStartError, PluginError

app = typer.Typer(
    name="gymlink",
    help="Train language-model agents in NeMo Gym environments with the trainer you already use.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Trainer = Annotated[str, typer.Argument(help="The trainer, such as trl, verl or openrlhf.")]
RUNS = Path("runs")
"""Where results go that no option names a folder for."""

FOUND_WRONG = 1
USED_WRONGLY = 2
INTERRUPTED = 130


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(context_settings={"allow_extra_args": True})
def demo(
    context: typer.Context,
    framework: Annotated[str, typer.Option(help="The trainer to demonstrate.")] = "trl",
    output: Annotated[Path, typer.Option(help="Where the results go.")] = RUNS / "demo",
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; by default enough to learn.")] = None,
) -> None:
    """Train a tiny model in a real NeMo Gym environment, without a GPU and without downloads of models.

    What follows `--` goes to the trainer.
    """
    from gymlink.demo import run_demo

    console = Console()
    problems = run_demo(framework, output, steps, console, context.args)
    for problem in problems:
        console.print(f"Found wrong: {problem}.", style="red", highlight=False)
    if problems:
        raise typer.Exit(FOUND_WRONG)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help"]}
)
def train(
    context: typer.Context,
    framework: Trainer,
    config: Annotated[Path, typer.Option(help="The run file: the trainer's own settings and `gym_config`.")],
) -> None:
    """Run the trainer's own training loop with rollouts from NeMo Gym. Further options go to the trainer."""
    from gymlink.plugins import find_framework, resolve

    resolve(find_framework(framework).train)(config, context.args)


@app.command()
def path(
    framework: Trainer,
    gym: Annotated[Path, typer.Option(help="The settings file with the environments.")] = Path("gym.yaml"),
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the file, the rollouts and the logs go; runs/FRAMEWORK when not given.")
    ] = None,
) -> None:
    """Write the file that a trainer's own launch command names to get its rollouts from NeMo Gym; print its path."""
    from gymlink.plugins import find_framework, resolve

    found = find_framework(framework)
    if found.path is None:
        switch = f" Switch it on with {found.switch}." if found.switch else ""
        raise PluginError(f"{framework} needs no file of gymlink's.{switch}")
    if not gym.exists():
        raise ConfigError(f"There is no settings file {str(gym)!r}: name it with --gym.")
    typer.echo(resolve(found.path)(gym, run_dir or RUNS / framework))


@app.command()
def prompts(
    framework: Trainer,
    rows: Annotated[Path, typer.Argument(help="Gym rows (JSONL).")],
    output: Annotated[
        Path | None,
        typer.Option(help="The file to write; ROWS.FRAMEWORK.jsonl when not given, or ROWS.FRAMEWORK-eval.jsonl."),
    ] = None,
    evaluation: Annotated[bool, typer.Option("--eval", help="The rows are for evaluation.")] = False,
) -> None:
    """Write Gym rows as the file of prompts that a trainer reads; print its path."""
    from gymlink.plugins import find_framework, resolve

    found = find_framework(framework)
    if found.prompts is None:
        raise PluginError(f"{framework} takes Gym rows as they are: give it {str(rows)!r} itself.")
    output = output or rows.with_suffix(f".{framework}{'-eval' if evaluation else ''}.jsonl")
    typer.echo(resolve(found.prompts)(rows, output, evaluation))


app.command()(serve)


def main() -> None:
    """The program. Turns gymlink's errors into one message on standard error and an exit status."""
    # A terminated program leaves through its `finally` blocks, so that Gym's servers are stopped.
    signal.signal(signal.SIGTERM, _leave)
    try:
        app()
    except (ConfigError, PluginError, GymStartError) as error:
        _complain(error)
        sys.exit(USED_WRONGLY)
    except GymlinkError as error:
        _complain(error)
        sys.exit(FOUND_WRONG)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:  # what typer makes of Ctrl-C
            _complain("interrupted; everything that was started has been stopped")
        raise


def _leave(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def _complain(error: GymlinkError | str) -> None:
    Console(stderr=True).print(f"gymlink: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
