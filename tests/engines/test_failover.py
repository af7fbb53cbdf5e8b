"""A pool of two real vLLM servers, of which one dies in the middle of a batch, in each way that servers die.

They break the second server; the first is there for others, with its first weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from gymlink.engines import EnginePool, VllmEngine
from gymlink.errors import EngineDownError
from gymlink.types import Generation, Sampling
from vllm_server import VllmServer

pytestmark = [pytest.mark.slow]

ROLLOUTS = 64
TOKENS = 300


class Counted(VllmEngine):
    """Counts the calls that it ended."""

    answered = 0

    async def generate(self, *prompt: Any, **how: Any) -> Generation:
        said = await super().generate(*prompt, **how)
        self.answered += 1
        return said


@pytest.fixture
def engines(servers: tuple[VllmServer, ...]) -> list[Counted]:
    return [Counted(server.url) for server in servers]


@pytest.fixture
async def pool(engines: list[Counted]) -> AsyncIterator[EnginePool]:
    made = EnginePool(engines, probe_every_s=0.5)
    yield made
    await made.aclose()


async def ask(pool: EnginePool, rollout: int, max_tokens: int = TOKENS) -> Generation:
    prompt = [5 + rollout, 6, 7]
    return await pool.generate(prompt, Sampling(max_tokens=max_tokens), stop_token_ids=(), rollout_id=str(rollout))


async def batch_during(pool: EnginePool, victim: VllmServer, what: Any) -> Sequence[Generation]:
    """A batch, in the middle of which something is done to one of the servers. Every call of it ends, and is whole."""
    calls = [asyncio.create_task(ask(pool, rollout)) for rollout in range(ROLLOUTS)]
    while not await asyncio.to_thread(victim.running):
        pass
    started = time.monotonic()
    await asyncio.to_thread(what)
    turns = await asyncio.gather(*calls)
    print(
        f"\n{ROLLOUTS} calls ended {time.monotonic() - started:.1f} s after it; "
        f"taken out: {pool.taken_out}, asked again: {pool.retried}, down: {list(pool.down)}"
    )
    assert {(turn.finish_reason, len(turn.token_ids), len(turn.logprobs)) for turn in turns} == {
        ("length", TOKENS, TOKENS)
    }
    return turns


async def test_rollouts_stay_and_are_shared_out(pool: EnginePool, engines: list[Counted]) -> None:
    await asyncio.gather(*(ask(pool, rollout, 4) for rollout in range(ROLLOUTS)))
    assert [engine.answered for engine in engines] == [ROLLOUTS // 2, ROLLOUTS // 2]
    homes = {rollout: replica.engine for rollout, replica in pool._homes.items()}
    for _ in range(2):
        await asyncio.gather(*(ask(pool, rollout, 4) for rollout in range(ROLLOUTS)))
    assert {rollout: replica.engine for rollout, replica in pool._homes.items()} == homes
    assert pool.max_context == 1024


async def test_one_that_is_killed_loses_nothing_and_comes_back(
    pool: EnginePool, engines: list[Counted], servers: tuple[VllmServer, ...], models: Any
) -> None:
    survivor, victim = servers
    await batch_during(pool, victim, victim.kill)
    assert (pool.taken_out, list(pool.down)) == (1, [str(engines[1])])
    assert 0 < pool.retried <= ROLLOUTS // 2
    assert Counter(engine.answered for engine in engines).total() == 2
    assert sum(engine.answered for engine in engines) == ROLLOUTS
    assert await asyncio.to_thread(survivor.running) == 0

    # Weights that the others were given meanwhile are loaded into it before it is asked again.
    await pool.load_weights(str(models[1].folder), 1)
    victim.start()
    await asyncio.to_thread(victim.wait)
    await until_none_is_down(pool)
    assert await engines[1].probe() == 1
    before = engines[1].answered
    turns = await asyncio.gather(*(ask(pool, rollout, 4) for rollout in range(ROLLOUTS, 2 * ROLLOUTS)))
    assert engines[1].answered > before
    assert {turn.weight_version for turn in turns} == {1}
    await pool.load_weights(str(models[0].folder), 0)


async def test_one_that_is_told_to_end_loses_nothing(
    pool: EnginePool, engines: list[Counted], servers: tuple[VllmServer, ...]
) -> None:
    """vLLM 0.29 then answers no call that it has begun, and keeps their connections open for ever."""
    victim = servers[1]
    await batch_during(pool, victim, victim.ask_to_end)
    assert list(pool.down) == [str(engines[1])]
    assert sum(engine.answered for engine in engines) == ROLLOUTS


async def test_when_none_is_left_each_is_named(servers: tuple[VllmServer, ...]) -> None:
    await asyncio.to_thread(servers[1].kill)
    dead = [VllmEngine(servers[1].url), VllmEngine("http://127.0.0.1:9")]
    pool = EnginePool(dead)
    with pytest.raises(EngineDownError) as told:
        await ask(pool, 0)
    assert all(f"{engine}: {engine} cannot be reached" in str(told.value) for engine in dead)
    await pool.aclose()


async def until_none_is_down(pool: EnginePool) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(60):
            while pool.down:  # noqa: ASYNC110 - the pool asks again on its own time
                await asyncio.sleep(0.1)
    assert pool.down == {}
