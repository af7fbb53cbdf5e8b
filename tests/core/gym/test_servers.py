"""Real Gyms: started, met by a second one, attached to, interrupted, killed, and broken in the usual ways."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from uv import find_uv_bin

from gymlink.config import GymSettings
from gymlink.errors import ConfigError, GymError, GymRequestError, GymStartError
from gymlink.gym import GymClient, GymServers, attach_gym, prepare_gym, read_rows, start_gym
from gymlink.gym.install import clean_environment

pytestmark = [pytest.mark.slow, pytest.mark.gym]

ENVIRONMENTS = Path(__file__).parents[3] / "examples" / "environments"
KEYPAD = "resources_servers/keypad/configs/keypad.yaml"
EXAMPLES = ENVIRONMENTS / "resources_servers"


def run(gym: GymServers, *rows: dict[str, Any], timeout_s: float = 60) -> list[dict[str, Any]]:
    async def all_of_them() -> list[dict[str, Any]]:
        async with GymClient(gym) as client:
            return await asyncio.gather(
                *(client.run(row["agent_ref"]["name"], row, timeout_s=timeout_s) for row in rows)
            )

    return asyncio.run(all_of_them())


def keypad_rows(gym: GymServers, count: int) -> list[dict[str, Any]]:
    return [*read_rows(EXAMPLES / "keypad/data/train.jsonl", agents=[*gym.agents])][:count]


def start(policy: Any, run_dir: Path, report: Any = print, **settings: Any) -> GymServers:
    settings = {"config_paths": [KEYPAD], "root": ENVIRONMENTS, **settings}
    return start_gym(
        GymSettings(**settings), policy_base_url=policy.url, policy_api_key=policy.key, run_dir=run_dir, report=report
    )


def gone(pids: Any, within_s: float = 15) -> bool:
    deadline = time.monotonic() + within_s
    while any(psutil.pid_exists(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def below(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def test_episodes_of_both_environments(running_gym: GymServers, policy: Any) -> None:
    stockroom = next(read_rows(EXAMPLES / "stockroom/data/example.jsonl")) | {"stock": {"nut": 3}}
    rows = [*keypad_rows(running_gym, 6), stockroom | {"wanted": {"nut": 2}}, stockroom | {"wanted": {"nut": 4}}]
    answers = run(running_gym, *rows)
    assert [answer["reward"] for answer in answers] == [1.0] * 6 + [1.0, 0.5]
    assert answers[0]["terminated"]
    kinds = [item.get("type") or item["role"] for item in answers[6]["response"]["output"]]
    assert kinds == ["function_call", "function_call_output", "message"]
    assert json.loads(answers[6]["response"]["output"][1]["output"]) == {"basket": {"nut": 2}}
    assert answers[0]["response"]["output"][0]["generation_token_ids"] == [7, 8]
    assert policy.keys == {f"Bearer {policy.key}"}
    second = next(request for request in policy.requests if len(request["messages"]) == 3)
    assert [message["content"] for message in second["messages"]][-1] == "digits: 4. type digits"


def test_two_hundred_episodes_at_once(running_gym: GymServers) -> None:
    rows = keypad_rows(running_gym, 50) * 4
    assert {answer["reward"] for answer in run(running_gym, *rows, timeout_s=120)} == {1.0}


def test_what_the_handle_tells(running_gym: GymServers) -> None:
    running_gym.check()
    assert running_gym.owned
    assert running_gym.version == "0.4.0"
    assert set(running_gym.agents) == {"keypad_agent", "stockroom_agent"}
    assert set(running_gym.servers) == {"keypad", "stockroom", "policy_model", *running_gym.agents}
    assert running_gym.log_dir is not None
    logs = {path.stem for path in running_gym.log_dir.iterdir()}
    assert logs == {*running_gym.servers, "gym"}
    assert "Uvicorn running" in (running_gym.log_dir / "keypad.log").read_text()


def test_the_key_is_nowhere_to_be_read(running_gym: GymServers, policy: Any) -> None:
    assert policy.key not in json.dumps(running_gym.config)
    for pid in running_gym.pids:
        assert policy.key not in " ".join(psutil.Process(pid).cmdline())


def test_a_bad_row_fails_alone_with_gyms_own_reason(running_gym: GymServers) -> None:
    (row,) = keypad_rows(running_gym, 1)
    with pytest.raises(GymRequestError, match="invalid literal for int") as raised:
        run(running_gym, row | {"turns": "many"})
    assert (raised.value.kind, raised.value.status) == ("http", 500)
    assert run(running_gym, row)[0]["reward"] == 1.0


def test_attaching_stops_nothing(running_gym: GymServers) -> None:
    with attach_gym(running_gym.head_url) as attached:
        assert attached.agents == running_gym.agents
        assert not attached.owned
        attached.check()
        assert run(attached, *keypad_rows(attached, 1))[0]["reward"] == 1.0
    attached.stop()
    running_gym.check()
    assert run(running_gym, *keypad_rows(running_gym, 1))[0]["reward"] == 1.0


def test_attaching_to_nothing() -> None:
    with pytest.raises(ConfigError, match=r"No answer from a NeMo Gym head server at http://127\.0\.0\.1:9"):
        attach_gym("http://127.0.0.1:9/")


def test_two_at_once_do_not_meet_and_a_death_is_noticed(running_gym: GymServers, policy: Any, tmp_path: Path) -> None:
    with start(policy, tmp_path) as second:
        assert second.head_url != running_gym.head_url
        assert second.config["ray_head_node_address"] != running_gym.config["ray_head_node_address"]
        urls = [server.url for gym in (running_gym, second) for server in gym.servers.values()]
        assert len(set(urls)) == len(urls)
        assert not set(second.pids) & set(running_gym.pids)
        row = keypad_rows(second, 1)[0]
        assert [run(gym, row)[0]["reward"] for gym in (running_gym, second)] == [1.0, 1.0]

        pid = second.servers["keypad"].pid
        assert pid is not None
        for child in [*below(pid), pid]:
            with contextlib.suppress(ProcessLookupError):  # a parent may end with its child
                os.kill(child, signal.SIGKILL)
        said = complaint(second)
        assert "'keypad' has ended" in said
        assert "Uvicorn running" in said
        pids = second.pids
    assert gone(pids, 0)
    running_gym.check()
    assert run(running_gym, row)[0]["reward"] == 1.0


def complaint(gym: GymServers) -> str:
    """What `check` says once it notices a death; empty when it has not within ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            gym.check()
        except GymError as error:
            return str(error)
        time.sleep(0.1)
    return ""


def test_a_server_that_dies_at_start_shows_its_own_log(policy: Any, tmp_path: Path) -> None:
    folder = tmp_path / "resources_servers" / "broken"
    (folder / "configs").mkdir(parents=True)
    (folder / "requirements.txt").write_text("nemo-gym\n")
    (folder / "app.py").write_text("raise ValueError('no such luck')\n")
    config = (EXAMPLES / "keypad/configs/keypad.yaml").read_text().replace("keypad", "broken")
    (folder / "configs" / "broken.yaml").write_text(config)
    with pytest.raises(GymStartError) as raised:
        start(policy, tmp_path / "run", root=tmp_path, config_paths=["resources_servers/broken/configs/broken.yaml"])
    message = str(raised.value)
    assert "Gym's server 'broken' has ended" in message
    assert str(tmp_path / "run" / "logs" / "broken.log") in message
    assert message.endswith("ValueError: no such luck")
    assert not _gyms_of_ours_but_the_shared_one()


def _gyms_of_ours_but_the_shared_one() -> list[str]:
    guards = [child for child in psutil.Process().children() if "guard.py" in " ".join(child.cmdline())]
    return [" ".join(guard.cmdline()) for guard in guards][1:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config_paths": ["nowhere.yaml"]}, "config_paths entry 'nowhere.yaml' was not found"),
        (
            {"overrides": {"keypad_agent.responses_api_agents.gymnasium_agent.resources_server.name": "kepad"}},
            "'keypad'",
        ),
    ],
)
def test_a_configuration_that_gym_refuses(policy: Any, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start(policy, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_port_in_use(policy: Any, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Port {port} on '127.0.0.1' is in use"):
            start(policy, tmp_path, overrides={"head_server": {"host": "127.0.0.1", "port": port}})


def test_ctrl_c_while_waiting_leaves_nothing(policy: Any, tmp_path: Path) -> None:
    seen: list[int] = []

    def press(said: str) -> None:
        if said.startswith(("starting Gym (1", "waiting for")):  # whichever comes first: Ray runs by then
            seen.extend(below(os.getpid()))
            raise KeyboardInterrupt

    before = set(below(os.getpid()))
    with pytest.raises(KeyboardInterrupt):
        start(policy, tmp_path, press)
    assert len(set(seen) - before) > 1
    assert gone(set(seen) - before, 0)


PARENT = """
import sys
from pathlib import Path
from gymlink.config import GymSettings
from gymlink.gym import start_gym
start_gym(GymSettings(config_paths=[sys.argv[1]], root=Path(sys.argv[2])), policy_base_url="http://127.0.0.1:9/v1",
          policy_api_key="x", run_dir=Path(sys.argv[3]), report=lambda said: print(said, flush=True))
"""


def test_killing_the_parents_whole_group_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, KEYPAD, str(ENVIRONMENTS), str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert parent.stdout is not None
        assert any(line.startswith("waiting for") for line in parent.stdout)  # Ray and the servers are there by now
        pids = below(parent.pid)
        homes = {psutil.Process(pid).environ().get("RAY_TMPDIR") for pid in pids}
        assert any("raylet" in " ".join(psutil.Process(pid).cmdline()) for pid in pids)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()
    assert gone(pids)
    assert not [home for home in homes if home and Path(home).exists()]


@pytest.fixture(scope="module")
def lent_pytest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Gym's interpreter, and a folder with pytest for it: Gym's own environment has none."""
    python, folder = prepare_gym(GymSettings(config_paths=[KEYPAD]), print).python, tmp_path_factory.mktemp("pytest")
    lend = [find_uv_bin(), "pip", "install", "--quiet", "--python", str(python), "--target", str(folder), "pytest"]
    subprocess.run(lend, check=True, env=clean_environment())
    return python, folder


@pytest.mark.parametrize("name", ["keypad", "stockroom"])
def test_the_environments_own_tests(name: str, lent_pytest: tuple[Path, Path]) -> None:
    python, folder = lent_pytest
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider", "tests"],
        cwd=EXAMPLES / name,
        env={**os.environ, "PYTHONPATH": f"{folder}:{EXAMPLES / name}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
