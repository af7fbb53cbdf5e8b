"""The demo: verl's own `main_ppo` teaches a tiny random model to type digits on a keypad, in a real Gym environment.

Everything is real but the model's size. verl wants an accelerator; without one, the options after `--` must say what to
train on instead (in a checkout, `make demo FRAMEWORK=verl` gives the CPU stand-ins of its tests).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from gymlink.demo import TASK, Watch
from gymlink.errors import PluginError, RolloutError
from gymlink.hookspecs import DemoRequest, DemoResult
from gymlink.launch import GrowingFile
from gymlink_ray.job import GYM_FILE
from gymlink_verl.launch import run_verl
from gymlink_verl.train import overrides_of

LOG = "verl.log"


def run(request: DemoRequest) -> DemoResult:
    """Train `keypad` as `request` asks.

    Raises:
        PluginError: there is no accelerator, and no option says what to train on.
        GymlinkError: Gym did not start, too many rollouts failed, or verl ended with an error.
    """
    _check_device(request)
    from gymlink_tiny import save_tiny

    steps = request.steps or TASK.steps
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        values = _run_file(request, folder, model=save_tiny(folder / "model", TASK.corpus), steps=steps)
        watch = _Watch(request, folder / "metrics.jsonl", steps)
        path = request.output / LOG
        with path.open("wb") as log:
            run_verl(
                [*overrides_of(values), *request.arguments],
                run_dir=request.output,
                output=log,
                log=path,
                env={"VERL_FILE_LOGGER_PATH": str(watch.metrics)},
                meanwhile=watch.look,
            )
    return watch.result(steps)


def _check_device(request: DemoRequest) -> None:
    import torch

    if not torch.cuda.is_available() and not request.arguments:
        raise PluginError(
            "verl needs an accelerator, and torch finds none. In a checkout, `make demo FRAMEWORK=verl` trains on the "
            "CPU; elsewhere, give verl's own settings for your device after --."
        )


def _run_file(request: DemoRequest, folder: Path, *, model: Path, steps: int) -> dict[str, Any]:
    """The run as a run file would say it."""
    server = request.environments / "resources_servers" / TASK.environment
    gym = {"config_paths": [str(server / "configs" / f"{TASK.environment}.yaml")], "root": str(request.environments)}
    gym_config = folder / "gym.yaml"
    gym_config.write_text(yaml.safe_dump({"gym": gym}), encoding="utf-8")
    return {
        "gym_config": gym_config,
        "train_file": server / "data" / "train.jsonl",
        "model_name_or_path": model,
        "output_dir": str(folder / "verl"),
        "max_turn_tokens": TASK.tokens_a_turn,
        "gymlink": {"run_dir": str(request.output.absolute())},
        "algorithm": {"adv_estimator": "grpo"},
        "data": {
            "train_batch_size": TASK.prompts_a_step,
            "max_prompt_length": 64,
            "max_response_length": 64,
            "dataloader_num_workers": 0,
        },
        "actor_rollout_ref": {
            "actor": {
                "ppo_mini_batch_size": TASK.prompts_a_step,
                "use_dynamic_bsz": True,
                "optim": {"lr": TASK.learning_rate},
            },
            "rollout": {
                "n": TASK.generations,
                "tensor_model_parallel_size": 1,
                "agent": {"num_workers": 1},
                **({} if request.arguments else {"name": "vllm"}),
            },
        },
        "trainer": {
            "n_gpus_per_node": 1,
            "total_training_steps": steps,
            "total_epochs": 1_000_000,  # the steps decide
            "save_freq": -1,
            "resume_mode": "disable",
            "logger": ["console", "file"],
        },
    }


class _Watch:
    """Reads what verl says and logs, as it grows, and passes it on."""

    def __init__(self, request: DemoRequest, metrics: Path, steps: int) -> None:
        self.metrics = metrics
        self._request = request
        self._watch = Watch(request, request.output / LOG, steps)
        self._logged = GrowingFile(metrics)
        self._seen: list[Mapping[str, float]] = []
        request.report("starting verl")

    def look(self) -> None:
        self._watch.new_lines()
        for line in self._logged.new_lines():
            logged = json.loads(line)
            figures = {key: float(value) for key, value in logged["data"].items()}
            self._seen.append(figures)
            self._watch.step(int(logged["step"]), figures["critic/score/mean"], figures["timing_s/step"], figures)

    def result(self, steps: int) -> DemoResult:
        if not self._seen:
            raise RolloutError(f"verl ended without a step; {self._request.output / LOG} has what it said.")
        return DemoResult(
            framework="verl",
            framework_version=version("verl"),
            gym_version=str(json.loads((self._request.output / GYM_FILE).read_text(encoding="utf-8"))["gym_version"]),
            environment=TASK.environment,
            steps=steps,
            rollouts=self._sum("count"),
            failed=self._sum("failed"),
            rewards=self._watch.rewards,
            prefix_breaks=self._sum("prefix_breaks"),
            tokens_sampled=self._sum("tokens_sampled"),
            tokens_trained=self._sum("tokens_trained"),
            tokens_dropped=self._sum("tokens_dropped"),
            max_logprob_error=None,
            max_prob_error=max(figures["training/rollout_probs_diff_max"] for figures in self._seen),
            seconds_train=round(self._watch.seconds, 2),
        )

    def _sum(self, name: str) -> int:
        return int(sum(figures[f"rollout/{name}"] for figures in self._seen))
