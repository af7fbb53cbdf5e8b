"""`gymlink train openrlhf`: what a run file stands for, and what is said of one that cannot work before it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from gymlink.errors import ConfigError
from gymlink_openrlhf import train as module
from gymlink_openrlhf.train import OWN, Run, flags_of, train
from gymlink_tiny import save_tiny
from openrlhf_flags import parsed, parser

WriteRun = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), heads=2)


@pytest.fixture
def run_file(tmp_path: Path, tiny: Path) -> WriteRun:
    """Writes a run file that works, with four rows, but for what is given; None leaves a key out."""

    def write(**changes: Any) -> Path:
        row = {"responses_create_params": {"input": "go"}, "agent_ref": {"name": "door"}}
        (tmp_path / "train.jsonl").write_text(4 * (json.dumps(row) + "\n"))
        (tmp_path / "eval.jsonl").write_text(json.dumps(row) + "\n")
        (tmp_path / "gym.yaml").write_text("gym: {config_paths: [keypad.yaml]}\n")
        values = {
            "gym_config": "gym.yaml",
            "train_file": "train.jsonl",
            "model_name_or_path": str(tiny),
            "output_dir": "out",
            "rollout": {"batch_size": 4},
            "vllm": {"num_engines": 1},
        }
        values = {key: value for key, value in {**values, **changes}.items() if value is not None}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], Path]]:
    """What OpenRLHF would be started with, read by its own parser, and the run's folder."""
    calls: list[tuple[dict[str, Any], Path]] = []
    monkeypatch.setattr(module, "run_openrlhf", lambda flags, *, run_dir, **_: calls.append((parsed(flags), run_dir)))
    return calls


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rollout": {"batch_size": 4, "temperature": 0.5}}, {"rollout.batch_size": 4, "rollout.temperature": 0.5}),
        ({"rollout.batch_size": 4}, {"rollout.batch_size": 4}),
        (
            {"actor": {"adam": {"lr": 1e-6, "betas": [0.9, 0.98]}}},
            {"actor.adam.lr": 1e-6, "actor.adam.betas": [0.9, 0.98]},
        ),
        ({"actor": {"adam": {"lr": "1e-6"}}}, {"actor.adam.lr": 1e-6}),
        ({"reward": {"clip_range": [-1.5, 1]}}, {"reward.clip_range": [-1.5, 1.0]}),
        ({"reward": {"stop_properly_penalty_coef": -1e-5}}, {"reward.stop_properly_penalty_coef": -1e-5}),
        ({"train": {"async_enable": True}}, {"train.async_enable": True}),
        ({"train": {"async_enable": False}}, {"train.async_enable": False}),
        ({"actor": {"dual_clip": None}}, {"actor.dual_clip": None}),
        ({"ds": {"zero_stage": 0}}, {"ds.zero_stage": 0}),
        (
            yaml.safe_load("algo: {advantage: {is_correction_level: off}}"),
            {"algo.advantage.is_correction_level": "off"},
        ),
        ({"logger": {"wandb": {"run_name": "it's --mine, {a}"}}}, {"logger.wandb.run_name": "it's --mine, {a}"}),
        ({"use_ms": True}, {"use_ms": True}),
    ],
    ids=lambda value: str(value)[:50],
)
def test_openrlhfs_flags_arrive_as_they_are_written(values: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    made = parsed(flags_of(values))
    assert {key: made[key] for key in expected} == expected


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"key rollout\.4 is no text"):
        flags_of({"rollout": {4: 1}})


def test_the_defaults_that_are_checked_are_openrlhfs() -> None:
    theirs = vars(parser().parse_args([]))
    ours = module._given([])
    assert ours == {key: theirs[key] for key in ours}


def test_it_starts_openrlhf_with_nothing_to_remember(run_file: WriteRun, started: list[Any], tmp_path: Path) -> None:
    train(run_file(eval_file="eval.jsonl", train={"num_episodes": 2}), ["--train.num_episodes", "3"])
    [(flags, run_dir)] = started
    assert run_dir == tmp_path / "out" / "gym"
    assert {path.name for path in run_dir.iterdir()} == {"agent.py", "prompts.jsonl", "eval-prompts.jsonl"}
    assert flags["train.agent_func_path"] == str(run_dir / "agent.py")
    assert f"gym_config='{tmp_path}/gym.yaml', run_dir='{run_dir}'" in (run_dir / "agent.py").read_text()
    for flag, split, count in (("data.prompt_dataset", "train", 4), ("eval.dataset", "val", 1)):
        prompts = [json.loads(line) for line in Path(flags[flag]).read_text().splitlines()]
        labels = [json.loads(prompt[flags["data.label_key"]]) for prompt in prompts]
        assert [label["gymlink"] for label in labels] == [{"index": at, "split": split} for at in range(count)]
        assert all(prompt[flags["data.input_key"]] == "door: go" for prompt in prompts)
    assert (flags["ckpt.output_dir"], flags["ckpt.path"]) == (f"{tmp_path}/out/model", f"{tmp_path}/out/checkpoints")
    assert flags["train.num_episodes"] == 3, "the command line wins"


def test_a_run_without_evaluation(run_file: WriteRun, started: list[Any]) -> None:
    train(run_file(), [])
    [(flags, run_dir)] = started
    assert flags["eval.dataset"] is None
    assert {path.name for path in run_dir.iterdir()} == {"agent.py", "prompts.jsonl"}


def test_the_output_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run.of({"gym_config": "/g", "train_file": "/t", "model_name_or_path": "/m"}, [])
    assert (run.output, run.run_dir) == (tmp_path / "runs/openrlhf", tmp_path / "runs/openrlhf/gym")


@pytest.mark.parametrize(
    ("changes", "arguments", "says"),
    [
        ({"rollout": {"batch_size": 5}}, [], r"4 rows to train on, and --rollout.batch_size is 5"),
        ({"rollout": {}}, [], r"--rollout.batch_size is 1024"),
        ({}, ["--rollout.batch_size=8"], r"--rollout.batch_size is 8"),
        ({}, ["--data.max_samples", "3"], r"There are 3 rows"),
        ({}, ["--rollout.batch_size", "many"], r"OpenRLHF's flags: .*rollout.batch_size.*'many'"),
        ({"vllm": {"num_engines": 0}}, [], r"--vllm.num_engines is 0"),
        ({"vllm": None}, [], r"--vllm.num_engines is None"),
        ({"output_dir": "a,b"}, [], r"',' in the path of a dataset"),
        ({"data": {"max_images_per_prompt": 1}}, [], r"text only"),
        ({}, ["--actor.model_name_or_path=/no/where"], "Cannot load the tokenizer of '/no/where'"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_work_is_said_before_anything_starts(
    run_file: WriteRun, started: list[Any], changes: dict[str, Any], arguments: list[str], says: str
) -> None:
    path = run_file(**changes)
    with pytest.raises(ConfigError, match=says):
        train(path, arguments)
    assert started == []
    assert {one.name for one in path.parent.iterdir()} == {"gym.yaml", "run.yaml", "train.jsonl", "eval.jsonl"}


def test_settings_that_ask_for_several_samples_of_a_rollout_are_refused(run_file: WriteRun, started: list[Any]) -> None:
    path = run_file()
    (path.parent / "gym.yaml").write_text("gym: {config_paths: [keypad.yaml]}\nalignment: {on_history_rewrite: fork}\n")
    with pytest.raises(ConfigError, match="on_history_rewrite is 'fork'"):
        train(path, [])
    assert started == []


def test_a_tokenizer_without_a_chat_template_is_refused(
    run_file: WriteRun, started: list[Any], tmp_path: Path, tiny: Path
) -> None:
    bare = AutoTokenizer.from_pretrained(tiny)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="chat template"):
        train(run_file(model_name_or_path="bare"), [])
    assert started == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gym_config": None}, "'gym_config' is missing"),
        ({"gym_config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"train_file": "run.yaml"}, "run.yaml:1: not JSON"),
        ({"eval_file": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model_name_or_path": "./nowhere"}, "no such folder"),
        ({"vllm": None}, "--vllm.num_engines is None"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_files_are_judged_before_anything_heavy_is_imported(
    run_file: WriteRun, changes: dict[str, Any], says: str
) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from gymlink.errors import ConfigError; from gymlink_openrlhf.train import train\n"
        "try: train(Path(sys.argv[1]), [])\n"
        "except ConfigError as error: print(error)\n"
        "print([name for name in ('torch', 'openrlhf', 'ray', 'transformers', 'vllm') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(run_file(**changes))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *message, imported = done.stdout.splitlines()
    assert says in "\n".join(message)
    assert imported == "[]"


def test_a_run_files_own_keys_are_no_flags(run_file: WriteRun, started: list[Any]) -> None:
    train(run_file(eval_file="eval.jsonl"), [])
    assert len(started) == 1, "OpenRLHF's parser took all flags"
    assert not set(OWN) & set(vars(parser().parse_args([])))
