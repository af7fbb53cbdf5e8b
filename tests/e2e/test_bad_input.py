"""What cannot work is one clear message and exit status 2, with nothing half-written."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gymlink.demo import environments_root

pytestmark = pytest.mark.slow

KEYPAD = "resources_servers/keypad"
Change = Callable[["Run"], None]


class Run:
    """A run file with all it needs, right until a test breaks one thing."""

    def __init__(self, folder: Path) -> None:
        from gymlink_tiny import save_tiny

        self.folder = folder
        self.model = save_tiny(folder / "model")
        self.rows = folder / "rows.jsonl"
        self.rows.write_text((environments_root() / KEYPAD / "data/train.jsonl").read_text())
        self.gym = {"gym": {"root": str(environments_root()), "config_paths": [self.config]}}
        self.run = {
            "model_name_or_path": str(self.model),
            "gym_config": "gym.yaml",
            "train_file": "rows.jsonl",
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "bf16": False,
            "max_steps": 1,
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "report_to": "none",
        }

    @property
    def config(self) -> str:
        return str(environments_root() / KEYPAD / "configs/keypad.yaml")

    def start(self) -> subprocess.CompletedProcess[str]:
        (self.folder / "gym.yaml").write_text(yaml.safe_dump(self.gym))
        (self.folder / "run.yaml").write_text(yaml.safe_dump(self.run))
        command = [sys.executable, "-m", "gymlink", "train", "trl", "--config", str(self.folder / "run.yaml")]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def missing_interpreter(run: Run) -> None:
    run.gym["gym"]["python"] = "/no/such/python3.12"


def unknown_key(run: Run) -> None:
    run.gym["rolout"] = {}


def unknown_run_key(run: Run) -> None:
    run.run["learning_rat"] = 1e-5


def missing_gym_config(run: Run) -> None:
    run.gym["gym"]["config_paths"] = ["resources_servers/nothing/configs/nothing.yaml"]


def not_json(run: Run) -> None:
    run.rows.write_text(run.rows.read_text() + "{not json\n")


def no_input(run: Run) -> None:
    run.rows.write_text('{"responses_create_params": {}}\n')


def no_rows(run: Run) -> None:
    run.run["train_file"] = "nothing.jsonl"


def other_agent(run: Run) -> None:
    row = json.loads(run.rows.read_text().splitlines()[0])
    row["agent_ref"]["name"] = "keypad_agnt"
    run.rows.write_text(json.dumps(row) + "\n")


def no_chat_template(run: Run) -> None:
    (run.model / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (missing_interpreter, "/no/such/python3.12"),
        (unknown_key, "unknown key 'rolout' (did you mean 'rollout'?)"),
        (unknown_run_key, "learning_rat"),
        (missing_gym_config, "resources_servers/nothing/configs/nothing.yaml"),
        (not_json, "rows.jsonl:65"),
        (no_input, "rows.jsonl:1"),
        (no_rows, "nothing.jsonl"),
        (other_agent, "keypad_agnt"),
        (no_chat_template, "chat template"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_bad_input_is_said_before_anything_is_written(change: Change, said: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    change(run)
    done = run.start()
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run.gym["gateway"] = {"port": taken.getsockname()[1]}
        done = run.start()
    assert done.returncode == 2, done.stderr
    assert f"gateway.port {run.gym['gateway']['port']} on 127.0.0.1 is in use" in done.stderr.replace("\n", "")


@pytest.mark.gym
def test_a_server_that_fails_to_start_is_shown_with_its_log(tmp_path: Path) -> None:
    run = Run(tmp_path)
    broken = tmp_path / "resources_servers/broken"
    (broken / "configs").mkdir(parents=True)
    (broken / "app.py").write_text("raise RuntimeError('the door is jammed')\n")
    (broken / "requirements.txt").write_text((environments_root() / KEYPAD / "requirements.txt").read_text())
    config = Path(run.config).read_text().replace("keypad", "broken")
    (broken / "configs/broken.yaml").write_text(config)
    run.gym["gym"] = {"root": str(tmp_path), "config_paths": ["resources_servers/broken/configs/broken.yaml"]}
    run.rows.write_text(run.rows.read_text().replace("keypad_agent", "broken_agent"))
    done = run.start()
    assert done.returncode == 2, done.stderr
    assert "the door is jammed" in done.stderr
