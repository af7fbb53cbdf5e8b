"""The job's actor by itself, and where its gateways listen; in a real Ray it is in `cluster`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError

from gymlink.config import GatewaySettings, Settings, parse_settings
from gymlink.errors import ConfigError, GymError, GymlinkError, GymRequestError, GymStartError
from gymlink.gateway import GatewayServer
from gymlink.host import HostedGym
from gymlink.launch import noted_error
from gymlink.rollout import Figures
from gymlink.types import RolloutStatus
from gymlink_ray.job import JobActor, _check_agents, front_of, plain, worker_gateway_of

HERE = "10.1.2.3"
NOBODY = "http://127.0.0.1:9"
GYM = HostedGym("http://front", "secret", {"known": "http://front/agents/known"}, "0.4.0")


def settings_with(**gateway: Any) -> Settings:
    return parse_settings({"gym": {"head_server": NOBODY}, "gateway": gateway})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Ray's nodes as this node, at `HERE`, is told of them."""
    nodes = [{"Alive": True}, {"Alive": True}, {"Alive": False}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: HERE)
    return nodes


@pytest.mark.parametrize(
    ("given", "listens", "advertised"),
    [
        ({}, HERE, None),
        ({"port": 8000}, HERE, None),
        ({"host": "10.9.9.9"}, "10.9.9.9", None),  # another interface
        ({"host": "0.0.0.0"}, "0.0.0.0", HERE),
        ({"host": "::"}, "::", HERE),
        ({"host": "0.0.0.0", "advertise_host": "node7"}, "0.0.0.0", "node7"),
        ({"advertise_host": "node7"}, HERE, "node7"),
        ({"host": "127.0.0.1", "advertise_host": "tunnel"}, "127.0.0.1", "tunnel"),
        ({"host": "2001:db8::1"}, "2001:db8::1", None),
    ],
)
def test_where_the_front_listens(cluster: Any, given: dict[str, Any], listens: str, advertised: str | None) -> None:
    front = front_of(settings_with(**given))
    assert front == GatewaySettings(host=listens, port=given.get("port", 0), advertise_host=advertised)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "localhost", "::1"])
def test_a_front_that_other_nodes_cannot_reach_is_refused(cluster: list[dict[str, Any]], host: str) -> None:
    with pytest.raises(ConfigError, match=rf"gateway.host is '{host}'.* this job has 2 nodes. Leave it out"):
        front_of(settings_with(host=host))
    cluster[1]["Alive"] = False
    assert front_of(settings_with(host=host)).host == host


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, GatewaySettings(host=HERE, advertise_host=HERE)),
        ({"port": 8000}, GatewaySettings(host=HERE, advertise_host=HERE)),  # the port is the front's
        ({"advertise_host": "node7"}, GatewaySettings(host=HERE, advertise_host=HERE)),  # so is the name
        ({"host": "10.9.9.9"}, GatewaySettings(host=HERE, advertise_host=HERE)),
        ({"host": "0.0.0.0"}, GatewaySettings(host="0.0.0.0", advertise_host=HERE)),
        ({"host": "::"}, GatewaySettings(host="::", advertise_host=HERE)),
        ({"host": "127.0.0.1"}, GatewaySettings(host="127.0.0.1")),
        ({"host": "::1"}, GatewaySettings(host="::1")),
        ({"host": "localhost"}, GatewaySettings(host="localhost")),
    ],
)
def test_where_a_workers_gateway_listens(cluster: Any, given: dict[str, Any], expected: GatewaySettings) -> None:
    assert worker_gateway_of(settings_with(**given)) == expected


def test_an_ipv6_node_has_an_address_that_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "::1")
    server = GatewayServer(None, worker_gateway_of(settings_with()))  # type: ignore[arg-type]
    server._socket.close()
    assert server.url.startswith("http://[::1]:")


def actor_in(folder: Path) -> JobActor:
    return JobActor(settings_with(), str(folder / "gym"), GatewaySettings())


async def test_why_gym_did_not_start_reaches_everyone_and_is_left_in_writing(tmp_path: Path) -> None:
    actor = actor_in(tmp_path)
    await actor.expect({"known"})
    failures = await asyncio.gather(*(actor.hosted() for _ in range(3)), return_exceptions=True)
    failures += await asyncio.gather(actor.hosted(), return_exceptions=True)
    assert [type(failure) for failure in failures] == [ConfigError] * 4
    assert {str(failure) for failure in failures} == {str(failures[0])}
    assert NOBODY in str(failures[0])
    noted = noted_error(tmp_path / "gym")
    assert isinstance(noted, ConfigError)
    assert str(noted) == str(failures[0])
    assert not (tmp_path / "gym" / "gym.json").exists()


async def test_what_was_not_foreseen_is_gym_not_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = actor_in(tmp_path)

    async def start() -> HostedGym:
        raise OSError("the disk is full")

    monkeypatch.setattr(actor._host, "start", start)
    with pytest.raises(GymStartError, match="OSError: the disk is full"):
        await actor.hosted()
    assert "the disk is full" in str(noted_error(tmp_path / "gym"))


@pytest.fixture
def actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobActor:
    """With a Gym that is up as soon as it is asked for."""
    actor = actor_in(tmp_path)
    started: list[str] = []

    async def start() -> HostedGym:
        started.append("once")
        assert len(started) == 1
        await asyncio.sleep(0.01)
        return GYM

    monkeypatch.setattr(actor._host, "start", start)
    return actor


async def test_gym_is_started_once_whoever_asks(actor: JobActor, tmp_path: Path) -> None:
    await actor.expect({"known"})
    assert await asyncio.gather(*(actor.hosted() for _ in range(5))) == [GYM] * 5
    assert (tmp_path / "gym" / "gym.json").read_text() == '{"gym_version": "0.4.0", "agents": ["known"]}\n'


async def test_one_who_does_not_wait_any_more_takes_nothing_from_the_others(actor: JobActor) -> None:
    impatient = asyncio.create_task(actor.hosted())
    await asyncio.sleep(0)
    impatient.cancel()
    assert await actor.hosted() == GYM


@pytest.mark.parametrize(("running", "fine"), [({"one"}, True), ({"one", "two"}, False), (set(), False)])
def test_rows_without_an_agent_are_for_the_only_one(running: set[str], fine: bool) -> None:
    if fine:
        _check_agents({"", "one"}, running)
    else:
        with pytest.raises(ConfigError, match=rf"rows without agent_ref, and {len(running)} agents run"):
            _check_agents({""}, running)


def test_an_error_comes_out_of_what_ray_wraps_around_it() -> None:
    error = GymError("the server 'door' has died")
    wrapped = RayTaskError("take", "Traceback (most recent call last): ...", error).as_instanceof_cause()
    assert isinstance(wrapped, GymError)
    assert plain(wrapped) is error
    assert plain(error) is error
    assert str(plain(ValueError("x"))) == "ValueError: x"
    refused = GymRequestError("no", kind="http")
    assert plain(refused) is refused


async def test_rows_for_an_agent_that_does_not_run_stop_the_job(actor: JobActor, tmp_path: Path) -> None:
    await actor.expect({"known"})
    assert await actor.hosted() == GYM
    await actor.expect({"known", "unknown"})  # the rows for validation are read later
    with pytest.raises(ConfigError, match=r"agent 'unknown', which does not run; running: known"):
        await actor.hosted()
    assert isinstance(noted_error(tmp_path / "gym"), ConfigError)


async def test_what_ended_is_taken_once_and_only_of_a_gym_that_runs(
    actor: JobActor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = Figures(RolloutStatus.COMPLETED, reward=1.0)
    await actor.ended("train", figures, b"{}\n")
    await actor.ended("val", figures, b"{}\n")
    with pytest.raises(GymError, match="No Gym runs"):
        await actor.take("train")
    monkeypatch.setattr(actor._host, "check", lambda: None)
    assert [await actor.take(split) for split in ("train", "train", "val")] == [[figures], [], [figures]]
    assert (tmp_path / "gym" / "rollouts.jsonl").read_bytes() == b"{}\n{}\n"


async def test_the_word_that_an_earlier_run_left_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gym").mkdir()
    (tmp_path / "gym" / "error.txt").write_text("ConfigError: of yesterday\n")
    actor = actor_in(tmp_path)
    assert noted_error(tmp_path / "gym") is None
    await actor.note(GymlinkError("of today"))
    assert str(noted_error(tmp_path / "gym")) == "of today"
