"""Counts agree under races: deadlines that pass and agents that answer while the policy is still sampling.

Over real HTTP, where a call can be interrupted at every point at which the gateway waits.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import orjson
import pytest

from gymlink.config import AlignmentSettings, GatewaySettings, RolloutSettings
from gymlink.engines import ScriptedEngine
from gymlink.errors import RolloutError
from gymlink.gateway import GatewayServer, PolicyService, Totals, create_app
from gymlink.rollout import Collector
from gymlink.session import _Ledger
from gymlink.types import Rollout, RolloutBatch, RolloutRequest, RolloutStatus, Sampling

SECRET = "s3cret"


class HttpGym:
    """Agents that call the policy over HTTP, several calls at a time, and may answer before all are done."""

    def __init__(self, http: aiohttp.ClientSession, url: str, *, forever: bool) -> None:
        self._http, self._url, self._forever = http, url, forever

    async def run(self, agent: str, row: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        rollout = orjson.loads(row["responses_create_params"]["metadata"]["extra_body"])
        left_behind = asyncio.create_task(self._ask(rollout, "left behind"))
        turn = 0
        while self._forever or turn < 2:
            await self._ask(rollout, f"turn {turn}")
            turn += 1
        await asyncio.sleep(0.001 * (hash(left_behind) % 5))
        return {"reward": 1.0, "response": {"output": []}}

    async def _ask(self, rollout: Mapping[str, str], text: str) -> None:
        body = {"messages": [{"role": "user", "content": text}], **rollout}
        headers = {"Authorization": f"Bearer {SECRET}"}
        async with self._http.post(f"{self._url}/v1/chat/completions", json=body, headers=headers) as answer:
            await answer.read()


@pytest.fixture
async def policy(chat_format) -> AsyncIterator[tuple[PolicyService, GatewayServer, aiohttp.ClientSession]]:
    stop = chat_format.stop_token_ids[0]
    service = PolicyService(chat_format, ScriptedEngine(lambda _: (7, 8, 9, stop), latency_s=0.004), Sampling())
    server = GatewayServer(create_app(service, SECRET), GatewaySettings())
    await server.start()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        yield service, server, http
    await server.stop()


@pytest.mark.parametrize("forever", [True, False], ids=["deadline passes", "answers early"])
async def test_every_batch_adds_up(policy, forever: bool) -> None:
    service, server, http = policy
    settings = RolloutSettings(deadline_s=0.15 if forever else 30, max_failed_fraction=1.0)
    params = {"input": [{"role": "user", "content": "x"}]}
    row = {"responses_create_params": params, "agent_ref": {"name": "a"}}
    collector = Collector(HttpGym(http, server.url, forever=forever), service, settings, AlignmentSettings())
    ledger = _Ledger(service.totals)
    for _ in range(12):
        ledger.begin()
        batch = await collector.collect([RolloutRequest(row, index) for index in range(64)])
        ledger.end(batch)
        assert {rollout.failure for rollout in batch.rollouts} == ({"timeout"} if forever else {None})
    await asyncio.sleep(0.1)
    assert service.totals.attributed_tokens <= service.totals.sampled_tokens


@pytest.mark.parametrize(
    ("sampled", "told", "dropped"), [(4, 3, 3), (3, 4, 4), (3, 3, 2)], ids=["lost", "invented", "not accounted for"]
)
def test_a_batch_that_does_not_add_up_is_refused(sampled: int, told: int, dropped: int) -> None:
    rollout = Rollout(
        RolloutRequest({}, 0), "0.a", RolloutStatus.FAILED, None, sampled_tokens=told, dropped={"failed": dropped}
    )
    totals = Totals()
    ledger = _Ledger(totals)
    ledger.begin()
    totals.sampled_tokens += sampled
    with pytest.raises(RolloutError, match=f"The engine sampled {sampled} tokens"):
        ledger.end(RolloutBatch([rollout], {}))
