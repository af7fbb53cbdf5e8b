"""`gymlink train verl`: what a run file stands for, and what is said of one that cannot work before verl starts."""

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
from transformers import AutoTokenizer

from gymlink.errors import ConfigError
from gymlink.plugins import find_framework, resolve
from gymlink_tiny import save_tiny
from gymlink_verl import train as module
from gymlink_verl.train import check, compose, overrides_of, train

WriteRun = Callable[..., Path]
OWN = {"gym_config": "/g.yaml", "train_file": "/t.jsonl", "model_name_or_path": "/m", "output_dir": "/out"}
STARTED = [
    "+gymlink=gym",
    "gymlink.gym_config='/g.yaml'",
    "gymlink.max_turn_tokens=null",
    "data.train_files='/t.jsonl'",
    "data.val_files='/t.jsonl'",
    "actor_rollout_ref.model.path='/m'",
    "trainer.default_local_dir='/out'",
    "hydra.run.dir='/out/hydra'",
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run_file(tmp_path: Path, tiny: Path) -> WriteRun:
    """Writes a run file that works, with four rows, but for what is given; None leaves a key out."""

    def write(**changes: Any) -> Path:
        row = {"responses_create_params": {"input": "go"}, "agent_ref": {"name": "door"}}
        (tmp_path / "train.jsonl").write_text(4 * (json.dumps(row) + "\n"))
        (tmp_path / "gym.yaml").write_text("gym: {config_paths: [keypad.yaml]}\n")
        values = {
            "gym_config": "gym.yaml",
            "train_file": "train.jsonl",
            "model_name_or_path": str(tiny),
            "output_dir": "out",
            "data": {"train_batch_size": 4},
        }
        values = {key: value for key, value in {**values, **changes}.items() if value is not None}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Path]]:
    """What verl would be started with: overrides and the run's folder."""
    calls: list[tuple[list[str], Path]] = []
    monkeypatch.setattr(module, "run_verl", lambda overrides, *, run_dir, **_: calls.append((overrides, run_dir)))
    return calls


def test_a_run_file_without_evaluation() -> None:
    never = ["trainer.val_before_train=false", "trainer.test_freq=-1"]
    assert overrides_of(OWN) == [*STARTED, *never]


def test_a_run_file_with_evaluation_leaves_its_times_to_verl() -> None:
    made = overrides_of({**OWN, "eval_file": "/e.jsonl", "max_turn_tokens": 8})
    assert "data.val_files='/e.jsonl'" in made
    assert "gymlink.max_turn_tokens=8" in made
    assert not [one for one in made if "val_before_train" in one or "test_freq" in one]


def test_the_output_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    made = overrides_of({key: value for key, value in OWN.items() if key != "output_dir"})
    assert f"trainer.default_local_dir='{tmp_path}/runs/verl'" in made


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"trainer": {"total_epochs": 3, "logger": ["console", "file"]}}, {"trainer.total_epochs": 3}),
        ({"trainer.total_epochs": 3}, {"trainer.total_epochs": 3}),
        ({"trainer": {"logger": ["console", "file"]}}, {"trainer.logger": ["console", "file"]}),
        ({"trainer": {"project_name": "it's, {a} [test]: 1"}}, {"trainer.project_name": "it's, {a} [test]: 1"}),
        ({"trainer": {"experiment_name": "12"}}, {"trainer.experiment_name": "12"}),
        ({"actor_rollout_ref": {"actor": {"optim": {"lr": 1e-6}}}}, {"actor_rollout_ref.actor.optim.lr": 1e-6}),
        ({"trainer": {"use_v1": False}}, {"trainer.use_v1": False}),
        (
            {"actor_rollout_ref": {"rollout": {"max_model_len": None}}},
            {"actor_rollout_ref.rollout.max_model_len": None},
        ),
        ({"+ray_kwargs": {"ray_init": {"address": "local"}}}, {"ray_kwargs.ray_init.address": "local"}),
        ({"+ray_kwargs.ray_init.address": "local"}, {"ray_kwargs.ray_init.address": "local"}),
        ({"++trainer": {"of_mine": 1, "total_epochs": 2}}, {"trainer.of_mine": 1, "trainer.total_epochs": 2}),
    ],
    ids=lambda value: str(value)[:50],
)
def test_verls_settings_arrive_as_they_are_written(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    from omegaconf import OmegaConf

    config = compose(overrides_of({**OWN, **settings}))
    assert {key: OmegaConf.select(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["trainer.totl_epochs=3"], r"no key 'trainer.totl_epochs' \(did you mean 'trainer.total_epochs'\?\)"),
        (["tainer.total_epochs=3"], r"no key 'tainer' \(did you mean 'trainer'\?\)"),
        (["gymlink.max_turn_token=3"], r"did you mean 'gymlink.max_turn_tokens'\?"),
        (["trainer.zzz=3"], r"to add it, write \+trainer.zzz"),
        (["trainer.total_epochs.x=3"], r"no key 'trainer.total_epochs.x'"),
        (["+data.train_batch_size=4"], r"Could not append.*data.train_batch_size"),
        (["data.train_batch_size=[1"], r"verl's configuration: "),
    ],
)
def test_a_setting_that_verl_does_not_know(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose(["+gymlink=gym", *overrides])


def test_it_starts_verl_with_what_was_checked(
    run_file: WriteRun, started: list[Any], tmp_path: Path, tiny: Path
) -> None:
    train(run_file(trainer={"total_epochs": 2}), ["trainer.total_epochs=3"])
    [(overrides, run_dir)] = started
    assert run_dir == tmp_path / "out" / "gym"
    config = compose(overrides)
    assert config.trainer.total_epochs == 3, "the command line wins"
    assert config.gymlink.gym_config == str(tmp_path / "gym.yaml")
    assert config.actor_rollout_ref.model.path == str(tiny)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "arguments", "says"),
    [
        ({"trainer": {"totl_epochs": 3}}, [], "did you mean 'trainer.total_epochs'"),
        ({"data": {"train_batch_size": 5}}, [], r"4 rows to train on, and data.train_batch_size is 5"),
        ({}, ["data.train_batch_size=8"], r"4 rows to train on, and data.train_batch_size is 8"),
        ({}, ["actor_rollout_ref.rollout.calculate_log_probs=false"], "calculate_log_probs is False"),
        ({}, ["gymlink.gym_config=nowhere.yaml"], r"nowhere\.yaml"),
        ({}, ["data.train_files=nowhere.jsonl"], r"nowhere\.jsonl"),
        ({}, ["actor_rollout_ref.model.path=/no/where"], "Cannot load the tokenizer of '/no/where'"),
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
    assert not (path.parent / "out").exists()


def test_rows_of_several_files_add_up(run_file: WriteRun, tmp_path: Path) -> None:
    run_file()
    file = str(tmp_path / "train.jsonl")
    values = {**yaml.safe_load((tmp_path / "run.yaml").read_text()), "gym_config": str(tmp_path / "gym.yaml")}
    overrides = [*overrides_of({**values, "train_file": file}), "data.train_batch_size=8"]
    with pytest.raises(ConfigError, match="4 rows"):
        check(compose(overrides))
    check(compose([*overrides, f"data.train_files=[{file},{file}]"]))


def test_a_tokenizer_without_a_chat_template_is_refused(
    run_file: WriteRun, started: list[Any], tmp_path: Path, tiny: Path
) -> None:
    bare = AutoTokenizer.from_pretrained(tiny)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="chat template"):
        train(run_file(model_name_or_path="bare"), [])
    given = "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|im_end|>{% endfor %}"
    template = given + "{% if add_generation_prompt %}<assistant>{% endif %}"
    train(run_file(model_name_or_path="bare", actor_rollout_ref={"model": {"custom_chat_template": template}}), [])
    assert len(started) == 1, "verl gives the tokenizer this template"
    train(run_file(model_name_or_path="bare", actor_rollout_ref={"model": {"tokenizer_path": str(tiny)}}), [])
    assert len(started) == 2, "verl takes the tokenizer from there"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gym_config": None}, "'gym_config' is missing"),
        ({"gym_config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"train_file": "run.yaml"}, "run.yaml:1: not JSON"),
        ({"eval_file": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model_name_or_path": "./nowhere"}, "no such folder"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_files_are_judged_before_verl_is_imported(run_file: WriteRun, changes: dict[str, Any], says: str) -> None:
    """verl takes ten seconds to import, which nobody should wait for to hear of a mistyped name."""
    script = (
        "import sys; from pathlib import Path\n"
        "from gymlink.errors import ConfigError; from gymlink_verl.train import train\n"
        "try: train(Path(sys.argv[1]), [])\n"
        "except ConfigError as error: print(error)\n"
        "print([name for name in ('torch', 'verl', 'ray', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(run_file(**changes))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *message, imported = done.stdout.splitlines()
    assert says in "\n".join(message)
    assert imported == "[]"


def test_gymlink_knows_it() -> None:
    framework = find_framework("verl")
    assert resolve(framework.train) is train


def test_a_plugin_that_verl_does_not_load_is_told(run_file: WriteRun) -> None:
    config = run_file()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "gymlink", "train", "verl", "--config", str(config)],
        env={**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "verl does not load gymlink's plugin" in done.stderr
    assert "VERL_USE_EXTERNAL_PLUGINS='none'" in done.stderr
