"""The demo: train a tiny model in a real Gym environment through a real trainer, and check what must hold.

This module knows stages, figures and files; the trainer's part is behind its plugin's `demo` function.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gymlink.errors import ConfigError, PluginError
from gymlink.hookspecs import DemoRequest, DemoResult
from gymlink.launch import SAYS, GrowingFile
from gymlink.plugins import find_framework, resolve
from gymlink.report import Reporter

MAX_ERRORS = {"max_logprob_error": 1e-4, "max_prob_error": 1e-4, "mean_logprob_error": 1e-3}
"""The limit of each figure that tells how far sampled and recomputed probabilities are apart."""
SETUP_STARTED = "GYMLINK_SETUP_STARTED"
"""Environment variable: the unix time at which set-up began, when something before this program did a part of it."""


@dataclass(frozen=True, slots=True)
class Task:
    """What every trainer's demo trains: settings under which the reward always rises from about 0.1 to 1.0 within the
    steps. `corpus` is what the tokenizer's merges are learnt from: short prompts make short steps.
    """

    environment: str = "keypad"
    steps: int = 40
    prompts_a_step: int = 4
    generations: int = 8
    tokens_a_turn: int = 8
    learning_rate: float = 1e-2
    corpus: Sequence[str] = (
        "system user assistant",
        "door 1. type digits",
        "digits: 2. type digits",
        "0 1 2 3 4 5 6 7 8 9",
    )


TASK = Task()


class Watch:
    """Follows a trainer's program through its log: what gymlink says there is reported, each step is passed on."""

    def __init__(self, request: DemoRequest, log: Path, steps: int) -> None:
        self.rewards: list[float] = []
        self._request = request
        self._log = GrowingFile(log)
        self._steps = steps
        self._started: float | None = None
        self._ended = 0.0

    def new_lines(self) -> list[str]:
        """The lines that the log has gained, after a report of gymlink's own among them."""
        lines = self._log.new_lines()
        for line in lines:
            _, says, text = line.partition(SAYS)
            if says:
                self._request.report(text)
        return lines

    def step(self, number: int, reward: float, seconds: float, figures: Mapping[str, float]) -> None:
        """A step has ended that took so long. `figures` are the trainer's."""
        if self._started is None:
            self._started = time.perf_counter() - seconds
            self._request.on_start(self._steps)
        self._ended = time.perf_counter()
        self.rewards.append(reward)
        self._request.on_step({"step": float(number), "reward": reward, **figures})

    @property
    def seconds(self) -> float:
        """From the beginning of the first step to the end of the last; 0 before one has ended."""
        return 0.0 if self._started is None else self._ended - self._started


def environments_root() -> Path:
    """The folder with the environments that gymlink ships, laid out as Gym expects."""
    package = Path(__file__).resolve().parent
    candidates = (package / "environments", package.parents[1] / "examples" / "environments")
    for candidate in candidates:
        if (candidate / "resources_servers").is_dir():
            return candidate
    raise ConfigError(f"The demo's environments are missing; looked in {', '.join(map(str, candidates))}.")


def run_demo(
    framework: str, output: Path, steps: int | None, console: Console, arguments: Sequence[str] = ()
) -> list[str]:
    """Run the demo of one framework, showing each stage; what was found wrong, in words (empty when all is well).

    Leaves `summary.json`, `rollouts.jsonl`, `metrics.jsonl` and `reward.png` in `output`; what an earlier demo left
    there is replaced.

    Raises:
        GymlinkError: the demo could not run.
    """
    started = float(os.environ.get(SETUP_STARTED) or time.time())
    found = find_framework(framework)
    if found.demo is None:
        raise PluginError(f"The plugin for {framework} has no demo.")
    output.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "rollouts.jsonl", "metrics.jsonl", "reward.png"):
        (output / name).unlink(missing_ok=True)
    with _Stages(console, output / "metrics.jsonl") as stages:
        stages.report(f"Loading {framework}")
        request = DemoRequest(
            output=output,
            environments=environments_root(),
            steps=steps,
            report=stages.report,
            on_start=stages.start_training,
            on_step=stages.step,
            arguments=tuple(arguments),
        )
        result: DemoResult = resolve(found.demo)(request)
    summary = result.summary(time.time() - started - result.seconds_train)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw_curve(result.rewards, output / "reward.png", title=f"{result.environment} with {framework}")
    show_curve(result.rewards, console)
    console.print_json(json.dumps(summary))
    console.print(f"Written to {output}/: summary.json, rollouts.jsonl, metrics.jsonl, reward.png")
    return list(_problems(result))


def _problems(result: DemoResult) -> Sequence[str]:
    accounted = result.tokens_trained + result.tokens_dropped
    errors = {name: error for name in MAX_ERRORS if (error := getattr(result, name)) is not None}
    wrong = {name: error for name, error in errors.items() if not error <= MAX_ERRORS[name]}  # also what is no number
    name, error = next(iter(wrong.items() or errors.items()), ("max_logprob_error", math.nan))
    first, last = result.reward_first, result.reward_last
    rises = last > first and last >= result.least_rise * first and last >= result.least_reward
    checks = {
        f"{result.failed} rollouts failed": result.failed == 0,
        f"{result.prefix_breaks} prompts did not extend what was sampled": result.prefix_breaks == 0,
        f"sampled and recomputed probabilities differ by {error:.2g}, more than {MAX_ERRORS[name]:g}": (
            error <= MAX_ERRORS[name]
        ),
        f"{result.tokens_sampled} tokens were sampled and {accounted} are accounted for": (
            accounted == result.tokens_sampled
        ),
        f"the reward did not rise as it must: {first:.3f} to {last:.3f}": rises,
    }
    return [problem for problem, fine in checks.items() if not fine]


def draw_curve(rewards: Sequence[float], path: Path, *, title: str) -> None:
    """The reward of each step as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="mean reward", title=title, ylim=(0, 1.05))
    axes.plot(range(1, len(rewards) + 1), rewards, marker=".")
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def show_curve(rewards: Sequence[float], console: Console) -> None:
    """The reward of each step as a chart in the terminal."""
    import uniplot

    chart = uniplot.plot_to_string(
        list(rewards),
        xs=list(range(1, len(rewards) + 1)),
        y_min=0,
        y_max=1,
        width=min(console.width - 12, 72),
        height=12,
        lines=True,
        title="mean reward by step",
    )
    console.print(chart, markup=False, highlight=False)


class _Stages:
    """Shows one line per stage with a spinner, then a bar for the training steps; plain lines without a terminal."""

    def __init__(self, console: Console, metrics: Path) -> None:
        self._console = console
        self._metrics = metrics
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=False,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("Starting", total=None)
        self._training = False
        self._reporter = Reporter(console)

    def report(self, text: str) -> None:
        if self._training:
            return
        if self._console.is_terminal:
            self._progress.update(self._task, description=text)
        else:
            self._reporter(text)

    def start_training(self, steps: int) -> None:
        self._training = True
        self._progress.reset(self._task, total=steps, description="Training")

    def step(self, figures: Mapping[str, float]) -> None:
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(figures)) + "\n")
        shown = f"step {figures['step']:.0f}: reward {figures['reward']:.3f}"
        self._progress.update(self._task, advance=1, description=f"Training, {shown}")
        if not self._console.is_terminal:
            self._console.print(shown, highlight=False)

    def __enter__(self) -> _Stages:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
