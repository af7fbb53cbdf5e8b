"""`gymlink train trl`: what is wrong is said before anything starts; two processes train in a real Gym."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gymlink.demo import environments_root
from gymlink.errors import ConfigError, PluginError
from gymlink_tiny import save_tiny
from gymlink_trl.launch import check_files, train
from gymlink_trl.train import parse, prepare

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run_file(tmp_path: Path, tiny: Path, rows_file: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a run file that works, but for what is given; None leaves a key out."""

    def write(**changes: Any) -> Path:
        rows_file("well")
        (tmp_path / "gym.yaml").write_text("gym: {config_paths: [keypad.yaml]}\n")
        values = {
            "gym_config": "gym.yaml",
            "train_file": "train.jsonl",
            "model_name_or_path": str(tiny),
            "output_dir": "out",
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_turn_tokens": 8,
            "max_steps": 1,
            "logging_steps": 1,
            "report_to": [],
            "disable_tqdm": True,
        }
        values = {key: value for key, value in {**values, **changes}.items() if value is not None}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def test_every_field_of_the_trainer_and_the_command_line_wins(run_file: Callable[..., Path]) -> None:
    path = run_file(learning_rate="3e-5", epsilon_high=0.28, check_logprobs="all")
    gym, training, model = parse(path, ["--learning_rate", "1e-4", "--dtype", "bfloat16"])
    assert (training.learning_rate, training.epsilon_high, gym.check_logprobs) == (1e-4, 0.28, "all")
    assert model.dtype == "bfloat16"


def test_paths_are_relative_to_the_run_file(run_file: Callable[..., Path], tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    path = run_file(model_name_or_path="model")
    gym, training, model = parse(path, [])
    assert gym.gym_config == str(tmp_path / "gym.yaml")
    assert training.output_dir == str(tmp_path / "out")
    assert model.model_name_or_path == str(tmp_path / "model")
    path = run_file(model_name_or_path="Qwen/Qwen3-0.6B")
    assert parse(path, [])[2].model_name_or_path == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    ("changes", "arguments", "says"),
    [
        ({"num_generation": 3}, [], "unknown key 'num_generation' .*did you mean 'num_generations'"),
        ({}, ["--num_generation_s", "3"], "command line: unknown key 'num_generation_s'"),
        ({"gym_config": None}, [], "gym_config"),
        ({"gym_config": "nowhere.yaml"}, [], r"nowhere\.yaml.*No such file"),
        ({"train_file": "nowhere.jsonl"}, [], r"nowhere\.jsonl.*No such file"),
        ({"model_name_or_path": None}, [], "model_name_or_path"),
        ({"model_name_or_path": "./nowhere"}, [], "'./nowhere', and there is no such folder"),
        ({"model_name_or_path": "/no/where"}, [], "'/no/where', and there is no such folder"),
        ({"model_name_or_path": "~/no/where"}, [], "no such folder"),
        ({"model_name_or_path": "models/of/mine"}, [], "no such folder"),
        ({}, ["--model_name_or_path", "./nowhere"], "'./nowhere', and there is no such folder"),
        ({}, ["--train_file=nowhere.jsonl"], r"nowhere\.jsonl.*No such file"),
        ({"num_generations": 2}, [], "1 rows.* 2 different"),
        ({"per_device_train_batch_size": 3}, [], "divisible"),
        ({"learning_rate": "much"}, [], "learning_rate"),
        ({"check_logprobs": "some"}, [], "check_logprobs"),
        ({"eval_strategy": "steps", "eval_steps": 1}, [], "no eval_file"),
        ({"eval_file": "train.jsonl"}, [], "nothing evaluates"),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_before_anything_is_written(
    run_file: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], arguments: list[str], says: str
) -> None:
    path = run_file(**changes)
    with pytest.raises(ConfigError, match=says):
        train(path, arguments)
    assert not (tmp_path / "out").exists()


def test_a_path_of_which_only_the_parent_exists_is_no_name_on_the_hub(
    run_file: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    check_files(run_file(model_name_or_path="Qwen/Qwen3-0.6B"), [])
    with pytest.raises(ConfigError, match="no such folder"):
        check_files(run_file(model_name_or_path="models/mine"), [])


def test_the_files_are_checked_without_importing_torch(run_file: Callable[..., Path]) -> None:
    script = (
        "import sys; from pathlib import Path; from gymlink_trl.launch import check_files;"
        "check_files(Path(sys.argv[1]), sys.argv[2:]);"
        "print([m for m in ('torch', 'trl', 'transformers', 'datasets') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(run_file()), "--train-file", str(run_file().with_name("train.jsonl"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_row_that_is_none_is_named(run_file: Callable[..., Path], tmp_path: Path) -> None:
    path = run_file()
    with (tmp_path / "train.jsonl").open("a") as rows:
        rows.write("{not json\n")
    with pytest.raises(ConfigError, match=r"train\.jsonl:2"):
        train(path, [])
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_chat_template_is_named(run_file: Callable[..., Path], tmp_path: Path) -> None:
    save_tiny(tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        train(run_file(model_name_or_path="mute"), [])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"use_vllm": True}, "use_vllm: false"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "enable_thinking"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_said(
    run_file: Callable[..., Path], tmp_path: Path, setting: dict[str, Any], says: str
) -> None:
    with pytest.raises(PluginError, match=says):
        train(run_file(**setting), [])
    assert not (tmp_path / "out").exists()


def test_a_run_trains_and_saves(run_file: Callable[..., Path], tmp_path: Path, sessions: list[Any]) -> None:
    train(run_file(), [])
    assert [session.running for session in sessions] == [False]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    train(run_file(max_steps=2, save_strategy="steps", save_steps=1), [])
    train(run_file(max_steps=3, resume_from_checkpoint="out/checkpoint-2", save_strategy="steps", save_steps=1), [])
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "reward" in entry] == [1, 2, 3]
    assert len(sessions[-1].batches) == 1


def test_checked_means_ready(run_file: Callable[..., Path]) -> None:
    run = prepare(run_file(), [])
    assert len(run.train_rows) == 1
    assert run.eval_rows is None


@pytest.mark.slow
@pytest.mark.gym
def test_two_processes_collect_a_slice_each(run_file: Callable[..., Path], tmp_path: Path) -> None:
    root = environments_root()
    data = root / "resources_servers" / "keypad" / "data"
    path = run_file(
        train_file=str(data / "train.jsonl"),
        eval_file=str(data / "eval.jsonl"),
        check_logprobs="all",
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        num_generations_eval=1,
        per_device_eval_batch_size=8,
    )
    (tmp_path / "gym.yaml").write_text(
        yaml.safe_dump({"gym": {"config_paths": [str(data.parent / "configs" / "keypad.yaml")], "root": str(root)}})
    )
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 -m gymlink train trl"
    finished = subprocess.run(
        [sys.executable, *launch.split(), "--config", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    written = [
        [json.loads(line) for line in (tmp_path / "out" / "gym" / name).read_bytes().splitlines()]
        for name in ("rollouts.jsonl", "rollouts.rank1.jsonl")
    ]
    assert [len(rollouts) for rollouts in written] == [16, 16]  # 2 steps of 4 and 8 to evaluate, in each process
    assert all(one["status"] != "failed" and one["turns"] == 2 for rollouts in written for one in rollouts)
    sampled = {json.dumps(one["trajectory"]) for rollouts in written for one in rollouts}
    assert len(sampled) == 32  # the processes sample from streams of their own
    history = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    names = ("rollout/max_logprob_error", "eval_rollout/max_logprob_error")
    errors = [entry[name] for entry in history for name in names if name in entry]
    assert len(errors) == 3
    assert all(error <= 1e-4 for error in errors)
    assert (tmp_path / "out" / "model.safetensors").is_file()
