"""The demo: TRL's own GRPOTrainer teaches a tiny random model to type digits on a keypad, in a real Gym environment.

Everything is real but the model's size. Seeds 0 to 4 reach the full reward by step 25; every step's logprobs are
checked.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from gymlink.config import parse_settings
from gymlink.demo import TASK
from gymlink.errors import PluginError
from gymlink.hookspecs import DemoRequest, DemoResult
from gymlink_tiny import make_model, make_tokenizer
from gymlink_trl.dataset import gym_dataset
from gymlink_trl.quiet import quiet_trainer
from gymlink_trl.rollout import GymRollout, gym_reward
from gymlink_trl.support import freeze_garbage


def run(request: DemoRequest) -> DemoResult:
    """Train `keypad` as `request` asks.

    Raises:
        PluginError: `request` has arguments, for which this demo has no use.
        GymlinkError: Gym did not start, or too many rollouts failed.
    """
    if request.arguments:
        raise PluginError(
            f"The demo of TRL takes no options of the trainer, and got {' '.join(request.arguments)!r}. "
            "To train with settings of your own: gymlink train trl --config run.yaml"
        )
    quiet_trainer()
    from trl import GRPOConfig, GRPOTrainer

    steps = request.steps or TASK.steps
    server = request.environments / "resources_servers" / TASK.environment
    settings = parse_settings(
        {
            "gym": {
                "config_paths": [str(server / "configs" / f"{TASK.environment}.yaml")],
                "root": str(request.environments),
            }
        },
        where="the demo",
    )
    tokenizer = make_tokenizer(TASK.corpus)
    steps_seen = _Steps(request, steps)
    # The trainer wants a folder for checkpoints, of which the demo writes none.
    with (
        TemporaryDirectory() as scratch,
        GymRollout(
            settings,
            run_dir=request.output,
            report=request.report,
            check_logprobs="all",
            max_turn_tokens=TASK.tokens_a_turn,
        ) as rollout,
    ):
        trainer = GRPOTrainer(
            model=make_model(tokenizer),
            reward_funcs=gym_reward,
            args=GRPOConfig(
                output_dir=scratch,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=TASK.prompts_a_step * TASK.generations,
                num_generations=TASK.generations,
                learning_rate=TASK.learning_rate,
                lr_scheduler_type="constant",
                beta=0.0,
                temperature=1.0,
                max_steps=steps,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=0,
            ),
            train_dataset=gym_dataset(server / "data" / "train.jsonl"),
            processing_class=tokenizer,
            rollout_func=rollout,
            callbacks=[steps_seen],
        )
        trainer.remove_callback(PrinterCallback)
        rollout.prepare(trainer)
        freeze_garbage()
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    totals = rollout.training
    return DemoResult(
        framework="trl",
        framework_version=version("trl"),
        gym_version=str(rollout.gym_version),
        environment=TASK.environment,
        steps=steps,
        rollouts=totals.rollouts,
        failed=totals.failed,
        rewards=steps_seen.rewards,
        prefix_breaks=totals.prefix_breaks,
        tokens_sampled=totals.tokens_sampled,
        tokens_trained=totals.tokens_trained,
        tokens_dropped=totals.tokens_dropped,
        max_logprob_error=float(rollout.max_logprob_error or 0.0),
        max_prob_error=None,
        seconds_train=round(seconds, 2),
    )


class _Steps(TrainerCallback):
    """Passes each step's figures on."""

    def __init__(self, request: DemoRequest, steps: int) -> None:
        self.rewards: list[float] = []
        self._request = request
        self._steps = steps

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._request.on_start(self._steps)

    def on_log(self, *given: Any, **named: Any) -> None:
        state, logs = given[1], named.get("logs") or {}
        if "reward" in logs:
            self.rewards.append(float(logs["reward"]))
            figures = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
            self._request.on_step({"step": float(state.global_step), **figures})
