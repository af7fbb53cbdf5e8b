"""`gymlink path openrlhf`: what is printed, what the file says, and that OpenRLHF takes it from any folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gymlink.errors import ConfigError
from gymlink_openrlhf.agent import write_agent

GYM = "gym: {config_paths: [keypad.yaml]}\n"


def gymlink(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "gymlink", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_it_prints_the_path_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "gym.yaml").write_text(GYM)
    done = gymlink("path", "openrlhf", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/runs/openrlhf/agent.py\n"


def test_the_file_carries_the_whole_configuration(tmp_path: Path) -> None:
    """OpenRLHF runs it as this does: by its path, in a folder and an environment of which it knows nothing."""
    folder = tmp_path / 'it\'s a "folder"'
    folder.mkdir()
    (folder / "gym.yaml").write_text(GYM)
    path = write_agent(folder / "gym.yaml", folder / "run")
    assert path == folder / "run" / "agent.py"
    given: dict[str, str] = {}

    class Package:
        @staticmethod
        def executor_for(**named: str) -> str:
            given.update(named)
            return "an executor"

    names: dict[str, object] = {}
    text = path.read_text(encoding="utf-8").replace("from gymlink_openrlhf import executor_for\n", "")
    exec(compile(text, str(path), "exec"), {"executor_for": Package.executor_for}, names)
    assert names["AgentExecutor"] == "an executor"
    assert given == {"gym_config": f"{folder}/gym.yaml", "run_dir": f"{folder}/run"}


def test_relative_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gym.yaml").write_text(GYM)
    monkeypatch.chdir(tmp_path)
    path = write_agent(Path("gym.yaml"), Path("run"))
    assert path == tmp_path / "run" / "agent.py"
    assert f"gym_config='{tmp_path}/gym.yaml', run_dir='{tmp_path}/run'" in path.read_text()


@pytest.mark.parametrize(
    ("gym", "says"),
    [
        ("gym: {}\n", "config_paths"),
        (GYM + "alignment: {on_history_rewrite: fork}\n", "on_history_rewrite is 'fork'"),
    ],
)
def test_settings_that_cannot_work_are_refused(gym: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "gym.yaml").write_text(gym)
    with pytest.raises(ConfigError, match=says):
        write_agent(tmp_path / "gym.yaml", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_settings_file_is_told_with_the_option_that_names_one(tmp_path: Path) -> None:
    done = gymlink("path", "openrlhf", folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "There is no settings file 'gym.yaml': name it with --gym." in done.stderr
    done = gymlink("path", "openrlhf", "--gym", "here/gym.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert "'here/gym.yaml'" in done.stderr
