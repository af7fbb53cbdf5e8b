"""One real Gym for two workers, which meet it at the front."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from gymlink.config import GatewaySettings, Settings, parse_settings
from gymlink.demo import environments_root
from gymlink.engines import ScriptedEngine
from gymlink.errors import ConfigError, GymError, GymStartError
from gymlink.gym import guard, parse_row, start_gym
from gymlink.host import GymHost, HostedGym
from gymlink.types import Rollout, RolloutRequest, Sampling
from gymlink.worker import RolloutWorker

KEYPAD = environments_root() / "resources_servers/keypad"
AGENT = "keypad_agent"
pytestmark = [pytest.mark.slow, pytest.mark.gym]


def settings_for(**gym: Any) -> Settings:
    gym = gym or {"config_paths": [str(KEYPAD / "configs/keypad.yaml")], "root": str(environments_root())}
    return parse_settings({"gym": gym, "rollout": {"deadline_s": 120}})


def requests() -> list[RolloutRequest]:
    lines = (KEYPAD / "data/train.jsonl").read_bytes().splitlines()[:4]
    return [RolloutRequest(parse_row(line, "row", [AGENT]), index) for index, line in enumerate(lines)]


@contextlib.asynccontextmanager
async def enlisted(host: GymHost, gym: HostedGym, tokenizer: Any, reply: str) -> AsyncIterator[RolloutWorker]:
    """A worker whose policy always says `reply`."""
    engine = ScriptedEngine(lambda _: tokenizer.encode(f"{reply}<|im_end|>", add_special_tokens=False))
    worker = RolloutWorker(settings_for(), tokenizer=tokenizer, engine=engine, sampling=Sampling(max_tokens=16))
    try:
        url = await worker.serve(gym.secret, GatewaySettings())
        worker.join(gym, owner=host.enlist(url), secret=gym.secret)
        yield worker
    finally:
        await worker.close()


def processes_of(host: GymHost) -> list[psutil.Process]:
    assert host._gym is not None
    return [psutil.Process(pid) for pid in host._gym.pids]


def still_there(processes: Sequence[psutil.Process], patience_s: float = 10.0) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=patience_s)[1]


def guards() -> set[int]:
    """The guards that this process has started; Gym is under one."""
    return {child.pid for child in psutil.Process().children() if str(guard.__file__) in child.cmdline()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host")


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One for the module: a host lives on the loop that it was started on."""
    with asyncio.Runner() as runner:
        yield runner.get_loop()


@pytest.fixture(scope="module")
def running(loop: asyncio.AbstractEventLoop, folder: Path) -> Iterator[tuple[GymHost, HostedGym]]:
    host = GymHost(settings_for(), folder, report=print)
    try:
        yield host, loop.run_until_complete(host.start())
    finally:
        loop.run_until_complete(host.stop())


def assert_exact(rollouts: Sequence[Rollout]) -> None:
    for rollout in rollouts:
        assert rollout.failure is None, rollout.detail
        assert [turn.parent for turn in rollout.turns] == [None, 0]
        assert len(rollout.segments) == 1
        assert rollout.trained_tokens == rollout.sampled_tokens


def test_two_workers_play_at_the_same_time_each_with_its_own_policy(loop, running, tokenizer) -> None:
    host, gym = running
    replies = {"1234": 1.0, "12ab": 0.5}

    async def play() -> dict[str, tuple[RolloutWorker, list[Rollout]]]:
        async with contextlib.AsyncExitStack() as stack:
            workers = [await stack.enter_async_context(enlisted(host, gym, tokenizer, reply)) for reply in replies]
            played = await asyncio.gather(*(worker.collect(requests()) for worker in workers))
            return {
                reply: (worker, list(batch.rollouts))
                for reply, worker, batch in zip(replies, workers, played, strict=True)
            }

    played = loop.run_until_complete(play())
    for reply, (worker, rollouts) in played.items():
        assert_exact(rollouts)
        assert [rollout.reward for rollout in rollouts] == [replies[reply]] * 4
        served = [call.rollout_id for call in worker.service.engine.calls]
        assert sorted(served) == sorted([rollout.rollout_id for rollout in rollouts] * 2), "its own, two turns each"
        assert worker.service.totals.attributed_tokens == sum(rollout.sampled_tokens for rollout in rollouts)
    owners = [{rollout.rollout_id.split(".")[0] for rollout in rollouts} for _, rollouts in played.values()]
    assert owners == [{"0"}, {"1"}]
    assert host.check() is None


def test_what_a_worker_needs_is_in_what_it_is_told(loop, running, folder) -> None:
    _, gym = running
    assert list(gym.agents) == [AGENT]
    assert gym.agents[AGENT].startswith(gym.head_url)
    assert gym.gym_version
    assert gym.secret not in "".join(path.read_text(errors="replace") for path in (folder / "logs").glob("*.log"))


async def test_a_server_of_gyms_that_dies_is_told_and_stopping_twice_leaves_nothing(tokenizer, tmp_path: Path) -> None:
    before = guards()
    host = GymHost(settings_for(), tmp_path)
    with pytest.raises(GymError, match="No Gym runs"):
        host.check()
    try:
        gym = await host.start()
        processes = processes_of(host)
        host.check()
        assert host._gym is not None
        server = next(one for one in host._gym.servers.values() if one.kind == "resources_servers")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        still_there([process for process in processes if process.pid == server.pid])
        with pytest.raises(GymError, match=rf"Gym's server '{server.name}' has ended"):
            host.check()
    finally:
        await host.stop()
    await host.stop()
    assert not still_there(processes)
    assert guards() == before
    with pytest.raises(GymError, match="No Gym runs"):
        host.check()
    async with httpx.AsyncClient() as http:
        with pytest.raises(httpx.ConnectError):
            await http.get(f"{gym.head_url}/health")


@pytest.mark.parametrize(
    ("configs", "said"),
    [(["no/such/config.yaml"], "no/such/config.yaml"), (["resources_servers/keypad/app.py"], "app.py")],
)
async def test_a_configuration_that_cannot_work_leaves_nothing(tmp_path: Path, configs: list[str], said: str) -> None:
    before, front = guards(), GatewaySettings(port=free_port())
    host = GymHost(settings_for(config_paths=configs, root=str(environments_root())), tmp_path, front=front)
    with pytest.raises(ConfigError, match=said):
        await host.start()
    assert guards() == before
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", front.port)) != 0, "the front is gone, too"
    await host.stop()


async def test_stopping_while_gym_comes_up_leaves_nothing(tmp_path: Path) -> None:
    before = guards()
    comes_up = asyncio.Event()
    loop = asyncio.get_running_loop()

    def report(text: str) -> None:
        if text.startswith(("starting Gym", "waiting for")):
            loop.call_soon_threadsafe(comes_up.set)

    host = GymHost(settings_for(), tmp_path, report=report)
    starting = asyncio.create_task(host.start())
    await asyncio.wait_for(comes_up.wait(), 120)
    assert guards() > before
    started = time.monotonic()
    await host.stop()
    with pytest.raises(GymStartError, match="stopped before it was up"):
        await starting
    assert time.monotonic() - started < 30
    assert guards() == before


async def test_cancelling_the_start_leaves_nothing(tmp_path: Path) -> None:
    before = guards()
    comes_up = asyncio.Event()
    loop = asyncio.get_running_loop()
    host = GymHost(settings_for(), tmp_path, report=lambda _: loop.call_soon_threadsafe(comes_up.set))
    starting = asyncio.create_task(host.start())
    await asyncio.wait_for(comes_up.wait(), 120)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert guards() == before


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


async def test_an_attached_gym_is_met_at_the_address_it_was_given(tokenizer, tmp_path: Path) -> None:
    port, key = free_port(), "a secret of theirs"
    theirs = settings_for().gym.model_copy(update={"overrides": {"policy_api_key": key}})

    def attach(head_url: str, at: int) -> GymHost:
        return GymHost(settings_for(head_server=head_url), tmp_path / "run", front=GatewaySettings(port=at))

    with await asyncio.to_thread(
        start_gym,
        theirs,
        policy_base_url=f"http://127.0.0.1:{port}/v1",
        policy_api_key="not this one",
        run_dir=tmp_path / "gym",
        report=print,
    ) as running:
        elsewhere = free_port()
        with pytest.raises(ConfigError, match=rf"calls the policy at .*, and this gateway answers at .*:{elsewhere}"):
            await attach(running.head_url, elsewhere).start()
        host = attach(running.head_url, port)
        try:
            gym = await host.start()
            assert (gym.head_url, gym.secret) == (f"http://127.0.0.1:{port}", key)
            async with enlisted(host, gym, tokenizer, "1234") as worker:
                batch = await worker.collect(requests())
            host.check()
        finally:
            await host.stop()
        assert_exact(batch.rollouts)
        assert [rollout.reward for rollout in batch.rollouts] == [1.0] * 4
        running.check()
