"""The demo: OpenRLHF's own `train_ppo_ray` teaches a tiny random model to type digits on a keypad, in a real Gym
environment.

Everything is real but the model's size. OpenRLHF wants a GPU; without one, the flags after `--` must say what to train
on instead (in a checkout, `make demo FRAMEWORK=openrlhf` gives the CPU stand-ins of its tests).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from gymlink.demo import TASK, Watch
from gymlink.errors import PluginError, RolloutError
from gymlink.hookspecs import DemoRequest, DemoResult
from gymlink_openrlhf.train import Run, start
from gymlink_ray.job import GYM_FILE

LOG = "openrlhf.log"
HEADS = 2
"""Of the model's attention: vLLM takes none with fewer than 32 dimensions a head."""
STEPS, LEARNING_RATE = 28, 4e-3
"""Fewer and smaller steps than others take: OpenRLHF's vLLM computes in bfloat16, with which sampled and recomputed
probabilities come apart as the logits grow."""
LEAST_RISE, LEAST_REWARD = 3.0, 0.6
STEP = re.compile(r"Global step (\d+): \{(.*)\}")
FIGURE = re.compile(r"'([^']+)': (-?(?:nan|inf|[\d.]+(?:e[+-]?\d+)?))(?=,|$)")


def run(request: DemoRequest) -> DemoResult:
    """Train `keypad` as `request` asks.

    Raises:
        PluginError: there is no GPU, and no flag says what to train on.
        GymlinkError: Gym did not start, too many rollouts failed, or OpenRLHF ended with an error.
    """
    _check_device(request)
    from gymlink_tiny import save_tiny

    steps = request.steps or STEPS
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        values = _run_file(request, folder, model=save_tiny(folder / "model", TASK.corpus, heads=HEADS), steps=steps)
        watch = _Steps(request, steps)
        path = request.output / LOG
        with path.open("wb") as log:
            made = replace(Run.of(values, request.arguments), run_dir=request.output.absolute())
            start(made, output=log, log=path, meanwhile=watch.look)
    return watch.result(steps)


def _check_device(request: DemoRequest) -> None:
    import torch

    if not torch.cuda.is_available() and not request.arguments:
        raise PluginError(
            "OpenRLHF needs a GPU, and torch finds none. In a checkout, `make demo FRAMEWORK=openrlhf` trains on the "
            "CPU; elsewhere, give OpenRLHF's own flags for your device after --."
        )


def _run_file(request: DemoRequest, folder: Path, *, model: Path, steps: int) -> dict[str, Any]:
    """The run as a run file would say it. OpenRLHF has no flag for the number of steps: the rows decide."""
    server = request.environments / "resources_servers" / TASK.environment
    gym = {"config_paths": [str(server / "configs" / f"{TASK.environment}.yaml")], "root": str(request.environments)}
    gym_config = request.output / "gym.yaml"
    gym_config.write_text(yaml.safe_dump({"gym": gym}), encoding="utf-8")
    train_file = folder / "train.jsonl"
    with (server / "data" / "train.jsonl").open("rb") as rows, train_file.open("wb") as file:
        file.writelines(islice(cycle(rows), steps * TASK.prompts_a_step))
    batch = TASK.prompts_a_step * TASK.generations
    one_gpu = not request.arguments  # which trainer and vLLM share; otherwise the flags say what there is
    return {
        "gym_config": gym_config,
        "train_file": train_file,
        "model_name_or_path": model,
        "output_dir": folder / "openrlhf",
        "data": {"max_len": 128},
        "rollout": {
            "batch_size": TASK.prompts_a_step,
            "n_samples_per_prompt": TASK.generations,
            "max_new_tokens": TASK.tokens_a_turn,
            "micro_batch_size": batch,
        },
        "train": {"batch_size": batch, "micro_batch_size": batch, "colocate_all": one_gpu},
        "algo": {
            "advantage": {"estimator": "group_norm", "is_correction_level": "token"},
            "kl": {"init_coef": 0},
        },
        "actor": {
            "num_gpus_per_node": 1,
            "adam": {"lr": LEARNING_RATE},
            "lr_scheduler": "constant",
        },
        "vllm": {
            "num_engines": 1,
            "gpu_memory_utilization": 0.1,
            "enforce_eager": True,
            "enable_sleep": one_gpu,
        },
        "ds": {"zero_stage": 0, "enable_sleep": one_gpu},
    }


def figures_of(line: str) -> tuple[int, dict[str, float]] | None:
    """Number and figures of the step of which a line of OpenRLHF's log tells; None when it tells of none.

    OpenRLHF 0.11.2 logs `Global step 3: {...}` (`PPOTrainer.fit`), a dict's repr in which a figure may be `nan`, and
    Ray puts a prefix before it. What is no number there is passed over.
    """
    found = STEP.search(line)
    if found is None:
        return None
    return int(found[1]), {name: float(value) for name, value in FIGURE.findall(found[2])}


class _Steps:
    """Reads what OpenRLHF says as it grows, passes it on, and keeps what the result needs."""

    def __init__(self, request: DemoRequest, steps: int) -> None:
        self._request = request
        self._watch = Watch(request, request.output / LOG, steps)
        self._errors: list[float] = []
        request.report("starting OpenRLHF")

    def look(self) -> None:
        for line in self._watch.new_lines():
            told = figures_of(line)
            if told is not None:
                self._step(*told)

    def _step(self, number: int, figures: Mapping[str, float]) -> None:
        self._errors.append(abs(figures.get("vllm_kl", math.nan)))
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        self._watch.step(number, figures["rollout/reward_mean"], figures["timing/step_total"], finite)

    def result(self, steps: int) -> DemoResult:
        output = self._request.output
        if not self._errors:
            raise RolloutError(f"OpenRLHF ended without a step; {output / LOG} has what it said.")
        lines = (output / "rollouts.jsonl").read_bytes().splitlines()
        rollouts: list[Mapping[str, Any]] = [json.loads(line) for line in lines]
        return DemoResult(
            framework="openrlhf",
            framework_version=version("openrlhf"),
            gym_version=str(json.loads((output / GYM_FILE).read_text(encoding="utf-8"))["gym_version"]),
            environment=TASK.environment,
            steps=steps,
            rollouts=len(rollouts),
            failed=sum(rollout["status"] == "failed" for rollout in rollouts),
            rewards=self._watch.rewards,
            prefix_breaks=_total(rollout["prefix_breaks"].values() for rollout in rollouts),
            tokens_sampled=sum(rollout["tokens_sampled"] for rollout in rollouts),
            tokens_trained=sum(rollout["tokens_trained"] for rollout in rollouts),
            tokens_dropped=_total(rollout["tokens_dropped"].values() for rollout in rollouts),
            max_logprob_error=None,
            max_prob_error=None,
            # `max` alone would lose what is no number.
            mean_logprob_error=math.nan if any(map(math.isnan, self._errors)) else max(self._errors),
            least_rise=LEAST_RISE,
            least_reward=LEAST_REWARD,
            seconds_train=round(self._watch.seconds, 2),
        )


def _total(counts: Iterable[Iterable[int]]) -> int:
    return sum(map(sum, counts))
