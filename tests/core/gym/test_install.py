import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gymlink.config import GymSettings
from gymlink.errors import ConfigError, GymError
from gymlink.gym import install
from gymlink.gym.install import GymEnvironment, ServerFolder, clean_environment, prepare_gym, prepare_server
from gymlink.gym.interpreter import Interpreter

OWN = Interpreter(Path(sys.executable), "3.11.0")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GYMLINK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_children_do_not_inherit_this_python_or_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "CONDA_PREFIX", "RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    env = clean_environment(first_on_path=[Path("/first")])
    assert not {"VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "CONDA_PREFIX", "RAY_ADDRESS", "RAY_TMPDIR"} & env.keys()
    assert env["PATH"].startswith("/first:")
    assert env["PYTHONUNBUFFERED"] == "1"


def test_uv_takes_packages_from_where_pip_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UV_FIND_LINKS", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_FIND_LINKS", "/a /b")
    monkeypatch.setenv("PIP_INDEX_URL", "https://index")
    assert clean_environment()["UV_FIND_LINKS"] == "/a,/b"
    assert clean_environment()["UV_DEFAULT_INDEX"] == "https://index"
    monkeypatch.setenv("UV_FIND_LINKS", "/mine")
    monkeypatch.setenv("UV_INDEX_URL", "https://mine")
    assert clean_environment()["UV_FIND_LINKS"] == "/mine"
    assert "UV_DEFAULT_INDEX" not in clean_environment()


@pytest.mark.parametrize(
    ("file", "text", "asked"),
    [
        ("requirements.txt", "-e nemo-gym[dev] @ ../../\n", []),
        ("requirements.txt", "# nothing\nNeMo_Gym[dev]>=0.4\n\n", []),
        ("requirements.txt", "-e nemo-gym[dev] @ ../../\nreasoning-gym>=0.1", ["reasoning-gym>=0.1"]),
        ("requirements.txt", "-r more.txt", ["-r {folder}/more.txt"]),
        ("pyproject.toml", '[project]\nname = "x"\ndependencies = ["nemo-gym[dev]"]\n', []),
        ("pyproject.toml", '[project]\nname = "x"\ndependencies = ["nemo-gym", "scipy"]\n', ["scipy"]),
    ],
)
def test_what_a_server_asks_for_besides_gym(tmp_path: Path, file: str, text: str, asked: list[str]) -> None:
    (tmp_path / file).write_text(text)
    assert install._requirements(tmp_path) == [line.format(folder=tmp_path) for line in asked]


def test_a_server_that_needs_only_gym_shares_its_environment(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("nemo-gym\n")
    gym = GymEnvironment(tmp_path / "gym", "0.4.0", OWN)
    folder = ServerFolder("resources_servers", "x", tmp_path)
    assert prepare_server(gym, folder, ["ray==1"], print) == gym.prefix


def test_a_server_folder_without_requirements(tmp_path: Path) -> None:
    gym = GymEnvironment(tmp_path / "gym", "0.4.0", OWN)
    with pytest.raises(ConfigError, match=r"neither requirements\.txt nor pyproject\.toml"):
        prepare_server(gym, ServerFolder("resources_servers", "x", tmp_path), [], print)


def made(prefix: Path) -> dict[str, str]:
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "python").touch()
    return {"path": "p", "version": "v"}


def test_half_made_is_made_anew_and_whole_is_kept(tmp_path: Path) -> None:
    prefix = tmp_path / "env"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "left over").touch()
    assert install._once(prefix, made, print) == {"path": "p", "version": "v"}
    assert not (prefix / "left over").exists()
    assert install._once(prefix, lambda _: pytest.fail("made twice"), print) == {"path": "p", "version": "v"}
    (prefix / "bin" / "python").unlink()  # as when its interpreter was removed
    (prefix / "left over").touch()
    install._once(prefix, made, print)
    assert not (prefix / "left over").exists()


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    count = []
    said: list[str] = []

    def slowly(prefix: Path) -> dict[str, str]:
        count.append(1)
        time.sleep(0.3)
        return made(prefix)

    threads = [threading.Thread(target=install._once, args=(tmp_path / "env", slowly, said.append)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count) == 1
    assert "waiting for another process that makes env" in said


def test_what_cannot_be_installed_says_what_uv_said(tmp_path: Path, home: Path) -> None:
    settings = GymSettings(config_paths=("x",), version="0.0.1")
    with pytest.raises(GymError, match=r"Could not install NeMo Gym 0\.0\.1 (.|\n)*nemo-gym==0\.0\.1"):
        prepare_gym(settings, print)
    assert not (home / "gym/nemo-gym-0.0.1/gymlink.json").exists()


def test_a_given_environment_without_gym_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a virtual environment"):
        prepare_gym(GymSettings(config_paths=("x",), venv=tmp_path), print)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "v")], check=True)
    with pytest.raises(ConfigError, match="nemo-gym is not installed in"):
        prepare_gym(GymSettings(config_paths=("x",), venv=tmp_path / "v"), print)
