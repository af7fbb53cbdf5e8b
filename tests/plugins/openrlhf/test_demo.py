"""The demo through the unmodified `train_ppo_ray` on the CPU, vLLM and DeepSpeed included, and what it reads there."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from demo_runs import Demo
from gymlink.errors import PluginError
from gymlink.hookspecs import DemoRequest
from gymlink_openrlhf import demo as module
from gymlink_openrlhf.demo import STEPS, figures_of

ON_CPU = Path(__file__).resolve().parents[2] / "openrlhf_on_cpu"
Start = Callable[..., Demo]

RECORDED = (
    "\x1b[36m(PPOTrainer pid=17525)\x1b[0m INFO 11-21 07:25:04 ppo_trainer.py:551] ✨ Global step 2: "
    "{'gym_turns': 2.0, 'actor_grad_norm': 0.4630567196333213, 'gym_failed': 0.0, 'vllm_kl': 3.7406571209430695e-05, "
    "'return': -3.3527612686157227e-08, 'timing/generation': 3.6247501373291016, "
    "'rollout/reward_mean': 0.06808261573314667, 'rollout/num_samples': 32.0, 'timing/step_total': 4.704867362976074}"
)


def test_a_recorded_line_is_read() -> None:
    assert figures_of(RECORDED) == (
        2,
        {
            "gym_turns": 2.0,
            "actor_grad_norm": 0.4630567196333213,
            "gym_failed": 0.0,
            "vllm_kl": 3.7406571209430695e-05,
            "return": -3.3527612686157227e-08,
            "timing/generation": 3.6247501373291016,
            "rollout/reward_mean": 0.06808261573314667,
            "rollout/num_samples": 32.0,
            "timing/step_total": 4.704867362976074,
        },
    )


def test_what_is_no_number_is_kept_apart() -> None:
    told = figures_of("Global step 12: {'kl': nan, 'low': -inf, 'name': 'a, b', 'none': None, 'steps': 3, 'lr': 1e-06}")
    assert told is not None
    number, figures = told
    assert number == 12
    assert math.isnan(figures.pop("kl"))
    assert figures == {"low": -math.inf, "steps": 3.0, "lr": 1e-6}


@pytest.mark.parametrize("line", ["", "(PPOTrainer pid=1) Generate samples:  75%|#  | 3/4", "Global step 3 begins"])
def test_other_lines_tell_of_no_step(line: str) -> None:
    assert figures_of(line) is None


def request(
    folder: Path, *arguments: str, on_step: Callable[[Mapping[str, float]], None] = lambda _: None
) -> DemoRequest:
    return DemoRequest(folder, folder, 2, lambda _: None, lambda _: None, on_step, arguments)


def test_steps_are_passed_on_while_they_end(tmp_path: Path) -> None:
    seen: list[Mapping[str, float]] = []
    watch = module._Steps(request(tmp_path, on_step=seen.append), 2)
    (tmp_path / module.LOG).write_text(RECORDED.replace("'gym_failed': 0.0", "'gym_failed': nan") + "\n")
    watch.look()
    watch.look()
    [step] = seen
    assert (step["step"], step["reward"]) == (2.0, 0.06808261573314667)
    assert "gym_failed" not in step, "what is no number is no JSON either"


@pytest.mark.parametrize(("kl", "error"), [("-2e-3", 2e-3), ("nan", math.nan)])
def test_the_worst_step_is_told(kl: str, error: float, tmp_path: Path) -> None:
    watch = module._Steps(request(tmp_path), 3)
    lines = [RECORDED, RECORDED.replace("3.7406571209430695e-05", kl), RECORDED]
    (tmp_path / module.LOG).write_text("\n".join(lines) + "\n")
    watch.look()
    (tmp_path / "rollouts.jsonl").touch()
    (tmp_path / "gym.json").write_text('{"gym_version": "0.4.0"}')
    assert watch.result(3).mean_logprob_error == pytest.approx(error, nan_ok=True)


def test_without_a_gpu_it_asks_for_flags(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"needs a GPU, and torch finds none.*make demo FRAMEWORK=openrlhf"):
        module.run(request(tmp_path))


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Start]:
    running: list[Demo] = []

    def start() -> Demo:
        env = {"PYTHONPATH": str(ON_CPU)}
        arguments = ["--ds.attn_implementation", "sdpa"]
        running.append(Demo(tmp_path / "out", framework="openrlhf", arguments=arguments, env=env))
        return running[-1]

    yield start
    for one in running:
        one.close()


@pytest.mark.slow
@pytest.mark.gym
def test_openrlhf_learns_the_demos_task_with_exact_tokens(demo: Start) -> None:
    run = demo()
    assert run.process.wait(580) == 0, run.text()
    summary = run.checked_summary(STEPS)
    assert summary["framework"] == "openrlhf"
    assert summary["rollouts"] == STEPS * 4 * 8
    assert summary["reward_last"] >= 0.6
    assert summary["reward_last"] >= 3 * summary["reward_first"]
    assert summary["tokens_dropped"] == 0
    run.assert_nothing_is_left()


@pytest.mark.slow
@pytest.mark.gym
def test_a_demo_that_is_killed_while_it_trains_leaves_nothing(demo: Start) -> None:
    run = demo()
    run.wait_for("step 1:")
    assert len(run.alive()) > 15
    run.process.send_signal(signal.SIGKILL)
    run.process.wait(60)
    run.assert_nothing_is_left()
