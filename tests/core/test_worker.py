"""A worker against a Gym of one agent, which calls the policy as Gym's model server does; real Gym is in test_host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from gymlink.config import GatewaySettings, parse_settings
from gymlink.engines import ScriptedEngine
from gymlink.errors import ConfigError, GymError
from gymlink.types import RolloutRequest, RolloutStatus, Sampling
from gymlink.worker import RolloutWorker

SECRET = "s3cret"
CONCURRENCY = 3
TRAIN, VALIDATE = Sampling(max_tokens=8), Sampling(temperature=0.5, top_p=0.9, max_tokens=2)


class Gym:
    """Plays two turns with the policy for each row, and rewards how much was said in the second."""

    head_url = "http://unused"

    def __init__(self) -> None:
        self.policy = ""
        self.secrets: list[str | None] = []
        self.at_once = self.most_at_once = 0
        app = web.Application()
        app.router.add_post("/run", self._run)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)

    async def start(self) -> None:
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.agents = {"agent": f"http://127.0.0.1:{self.runner.addresses[0][1]}"}

    async def _run(self, request: web.Request) -> web.Response:
        self.secrets.append(request.headers.get("Authorization"))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            params = (await request.json())["responses_create_params"]
            extra = orjson.loads(params["metadata"]["extra_body"])
            messages = [*params["input"]]
            async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {SECRET}"}) as http:
                for _ in range(2):
                    body = {"messages": messages, "return_tokens_as_token_ids": True, **extra}
                    async with http.post(f"{self.policy}/v1/chat/completions", json=body) as answer:
                        if answer.status != 200:
                            return web.Response(status=500, text=await answer.text())
                        said = (await answer.json())["choices"][0]["message"]
                    messages += [said, {"role": "user", "content": "go on"}]
        finally:
            self.at_once -= 1
        reward = float(len(said["generation_token_ids"]))
        return web.json_response({"reward": reward, "response": {"output": []}})


@pytest.fixture
async def gym() -> AsyncIterator[Gym]:
    gym = Gym()
    try:
        await gym.start()
        yield gym
    finally:
        await gym.runner.cleanup()


@pytest.fixture
async def worker(tokenizer: Any) -> AsyncIterator[RolloutWorker]:
    settings = parse_settings({"gym": {"head_server": "http://unused"}, "rollout": {"concurrency": CONCURRENCY}})
    engine = ScriptedEngine(lambda _: (72, 105, 33, tokenizer.eos_token_id))
    worker = RolloutWorker(settings, tokenizer=tokenizer, engine=engine, sampling=TRAIN)
    try:
        yield worker
    finally:
        await worker.close()


async def joined(worker: RolloutWorker, gym: Gym, **given: Any) -> RolloutWorker:
    gym.policy = await worker.serve(SECRET, GatewaySettings())
    worker.join(gym, owner=4, **given)
    return worker


def request(index: int = 0) -> RolloutRequest:
    row = {"responses_create_params": {"input": [{"role": "user", "content": "hi"}]}, "agent_ref": {"name": "agent"}}
    return RolloutRequest(row, index)


def engine_of(worker: RolloutWorker) -> ScriptedEngine:
    engine = worker.service.engine
    assert isinstance(engine, ScriptedEngine)
    return engine


async def test_a_rollout_is_an_exact_chain_under_the_workers_own_name(worker: RolloutWorker, gym: Gym) -> None:
    rollout = await (await joined(worker, gym, secret="gyms")).rollout(request())
    assert (rollout.status, rollout.reward) == (RolloutStatus.COMPLETED, 4.0), rollout.detail
    assert [turn.parent for turn in rollout.turns] == [None, 0]
    assert [call.rollout_id for call in engine_of(worker).calls] == [rollout.rollout_id] * 2
    assert rollout.rollout_id.startswith("4.")
    assert rollout.trained_tokens == rollout.sampled_tokens == worker.service.totals.attributed_tokens == 8
    assert gym.secrets == ["Bearer gyms"]


async def test_a_gym_without_a_secret_is_sent_none(worker: RolloutWorker, gym: Gym) -> None:
    await (await joined(worker, gym)).rollout(request())
    assert gym.secrets == [None]


async def test_two_ways_to_sample_at_the_same_time(worker: RolloutWorker, gym: Gym) -> None:
    """Validation runs beside training; the rollouts without a sampling of their own have the worker's."""
    engine_of(worker).latency_s = 0.1
    await joined(worker, gym)
    given = [TRAIN, VALIDATE, None]
    rollouts = await asyncio.gather(*(worker.rollout(request(), sampling=sampling) for sampling in given))
    assert gym.most_at_once == 3
    assert [rollout.reward for rollout in rollouts] == [4.0, 2.0, 4.0], [rollout.detail for rollout in rollouts]
    used = {rollout.rollout_id: sampling or TRAIN for rollout, sampling in zip(rollouts, given, strict=True)}
    calls = engine_of(worker).calls
    assert len(calls) == 6
    assert all(call.sampling == used[call.rollout_id] for call in calls)


async def test_no_more_at_once_than_asked_for_whoever_asks(worker: RolloutWorker, gym: Gym) -> None:
    engine_of(worker).latency_s = 0.05
    await joined(worker, gym)
    batch, *alone = await asyncio.gather(worker.collect([request(), request(1)]), *map(worker.rollout, [request()] * 6))
    assert gym.most_at_once == CONCURRENCY
    assert all(rollout.reward == 4.0 for rollout in [*batch.rollouts, *alone])


async def test_a_worker_that_has_not_joined_says_so(worker: RolloutWorker) -> None:
    with pytest.raises(GymError, match="has not joined a Gym"):
        await worker.rollout(request())
    await worker.serve(SECRET, GatewaySettings())
    with pytest.raises(GymError, match="has not joined a Gym"):
        await worker.collect([request()])


async def test_closing_ends_all_at_any_moment_and_twice(worker: RolloutWorker, gym: Gym) -> None:
    await worker.close()
    await joined(worker, gym)
    await worker.close()
    assert engine_of(worker).closed
    await worker.close()
    with pytest.raises(GymError, match="or is closed"):
        await worker.rollout(request())
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientConnectorError):
            await http.get(f"{gym.policy}/health")


async def test_closing_ends_a_rollout_that_runs_with_a_failure(worker: RolloutWorker, gym: Gym) -> None:
    engine_of(worker).latency_s = 60
    running = asyncio.create_task((await joined(worker, gym)).rollout(request()))
    async with asyncio.timeout(5):
        while not engine_of(worker).calls:  # noqa: ASYNC110 - the engine has no event to wait for
            await asyncio.sleep(0.01)
    await worker.close()
    rollout = await asyncio.wait_for(running, 5)
    assert (rollout.status, rollout.reward) == (RolloutStatus.FAILED, None)


async def test_an_address_that_cannot_be_had_is_said_and_nothing_is_left(worker: RolloutWorker) -> None:
    with pytest.raises(ConfigError, match=r"gateway.host '203.0.113.1' port 0 cannot be used"):
        await worker.serve(SECRET, GatewaySettings(host="203.0.113.1"))
    await worker.close()
