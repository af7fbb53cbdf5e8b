"""The command line as a person meets it: run as a program, judged by what it prints and its exit status."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import gymlink
from gymlink import demo, plugins
from gymlink.cli import app
from gymlink.demo import environments_root
from gymlink.errors import PluginError
from gymlink.hookspecs import DemoRequest, DemoResult, Framework
from gymlink.plugins import load_plugins


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gymlink", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_version() -> None:
    assert run("--version").stdout.strip() == gymlink.__version__


def test_help_names_the_commands_and_starts_quickly() -> None:
    code = "import sys; import gymlink.cli; print({'torch', 'transformers', 'renderers', 'aiohttp'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert loaded.stdout.strip() == "set()"
    printed = run("--help").stdout
    assert "demo" in printed
    assert "train" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "nothing", "--config", "x.yaml"), "No framework is called 'nothing'; known: openrlhf, trl, verl"),
        (("train", "trl", "--config", "/no/such/run.yaml"), "/no/such/run.yaml"),
        (("demo", "--framework", "nothing"), "No framework is called 'nothing'"),
        (("demo", "--steps", "0"), "Input should be greater than or equal to 1"),
        (("demo", "--setps", "3"), "No such option: --setps"),
        (("nonsense",), "No such command 'nonsense'"),
    ],
)
def test_wrong_use_is_one_message_and_status_2(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("trl", 'trl needs no file of gymlink\'s. Switch it on with rollout_func=GymRollout("gym.yaml")'),
        ("verl", "verl needs no file of gymlink's. Switch it on with +gymlink=gym on your launch command."),
    ],
)
def test_a_trainer_that_needs_no_file_is_switched_on_otherwise(
    name: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "find_framework", load_plugins().frameworks.__getitem__)  # whatever is installed here
    for arguments, said in (["path", name], says), (["prompts", name, "rows.jsonl"], "give it 'rows.jsonl' itself"):
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, PluginError)
        assert said in str(done.exception)


def test_the_demos_environments_are_found() -> None:
    assert (environments_root() / "resources_servers/keypad/app.py").is_file()


def result(**changes: object) -> DemoResult:
    fields: dict[str, object] = {
        "framework": "trl",
        "framework_version": "1",
        "gym_version": "0.4.0",
        "environment": "keypad",
        "steps": 10,
        "rollouts": 20,
        "failed": 0,
        "rewards": [0.1] * 5 + [0.9] * 5,
        "prefix_breaks": 0,
        "tokens_sampled": 10,
        "tokens_trained": 8,
        "tokens_dropped": 2,
        "max_logprob_error": 1e-6,
        "max_prob_error": None,
        "seconds_train": 2.0,
    }
    return DemoResult(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_summary_has_the_means_of_the_ends() -> None:
    summary = result().summary(seconds_setup=3.0)
    assert summary["reward_first"] == pytest.approx(0.1)
    assert summary["reward_last"] == pytest.approx(0.9)
    assert summary["seconds_setup"] == 3.0
    assert summary["mean_logprob_error"] is None
    assert not {"rewards", "least_rise", "least_reward"} & set(summary)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"failed": 1}, "1 rollouts failed"),
        ({"prefix_breaks": 2}, "2 prompts did not extend"),
        ({"max_logprob_error": 1e-3}, "probabilities differ by 0.001"),
        ({"max_prob_error": 1e-3}, "probabilities differ by 0.001"),
        ({"max_logprob_error": float("nan")}, "probabilities differ by nan"),
        ({"max_prob_error": float("nan")}, "probabilities differ by nan"),
        ({"max_logprob_error": None}, "probabilities differ by nan"),
        ({"max_logprob_error": None, "mean_logprob_error": 1e-3}, None),
        ({"mean_logprob_error": 2e-3}, "probabilities differ by 0.002, more than 0.001"),
        ({"mean_logprob_error": float("nan")}, "probabilities differ by nan"),
        ({"tokens_trained": 7}, "10 tokens were sampled and 9 are accounted for"),
        ({"rewards": [0.5] * 10}, "the reward did not rise"),
        ({"rewards": [0.3] * 5 + [0.9] * 5, "least_rise": 2.5}, None),
        ({"rewards": [0.3] * 5 + [0.7] * 5, "least_rise": 2.5}, "the reward did not rise as it must: 0.300 to 0.700"),
        ({"rewards": [0.1] * 5 + [0.5] * 5, "least_reward": 0.6}, "the reward did not rise"),
    ],
)
def test_what_must_hold_is_checked(changes: dict[str, object], said: str | None) -> None:
    problems = demo._problems(result(**changes))
    assert [said in problem for problem in problems] == ([True] if said else [])


@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        ((), ()),
        (("--", "+device=cpu", "--seed", "3"), ("+device=cpu", "--seed", "3")),
    ],
)
def test_what_follows_two_dashes_goes_to_the_demos_trainer(
    given: tuple[str, ...], passed_on: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[DemoRequest] = []

    def train(request: DemoRequest) -> DemoResult:
        requests.append(request)
        return result()

    monkeypatch.setattr(demo, "find_framework", lambda name: Framework(name, name, "", name, "", "", demo="here:train"))
    monkeypatch.setattr(demo, "resolve", {"here:train": train}.__getitem__)
    done = CliRunner().invoke(app, ["demo", "--steps", "10", "--output", str(tmp_path), *given])
    assert done.exit_code == 0, done.output
    assert [(request.steps, request.arguments) for request in requests] == [(10, passed_on)]


def test_the_curve_is_drawn_and_shown(tmp_path: Path) -> None:
    rewards = [0.1, 0.4, 0.9]
    demo.draw_curve(rewards, tmp_path / "reward.png", title="t")
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=80, record=True, file=(tmp_path / "out.txt").open("w"))
    demo.show_curve(rewards, console)
    console.file.close()
    assert "mean reward by step" in (tmp_path / "out.txt").read_text()
