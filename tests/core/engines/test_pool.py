"""A pool of replicas, which are scripted here; with real servers it is in tests/engines."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest

from gymlink.engines import EnginePool, ScriptedEngine, pool
from gymlink.errors import ConfigError, EngineDownError, EngineError
from gymlink.testing import EngineContract
from gymlink.types import Generation, Sampling

SOON_S = 0.02


class Replica(ScriptedEngine):
    """A scripted engine that samples its own number, and can be told to refuse or to hang."""

    def __init__(self, number: int, **script: object) -> None:
        super().__init__(lambda _: (number, 9), **script)  # type: ignore[arg-type]
        self.number = number
        self.refuses: EngineError | None = None
        self.loads: EngineError | None = None
        self.hangs = False
        self.aborts = False
        self.cancelled = 0

    def __str__(self) -> str:
        return f"replica {self.number}"

    async def generate(self, *prompt: object, **how: object) -> Generation:
        if self.hangs:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if self.refuses:
            raise self.refuses
        if self.aborts:
            return Generation((self.number,), (-0.5,), "abort")
        return await super().generate(*prompt, **how)  # type: ignore[arg-type]

    async def load_weights(self, path: str, version: int) -> None:
        if self.loads:
            raise self.loads
        await super().load_weights(path, version)


@pytest.fixture
def replicas() -> list[Replica]:
    return [Replica(number, latency_s=0.005) for number in range(3)]


@pytest.fixture
async def three(replicas: list[Replica]) -> AsyncIterator[EnginePool]:
    made = EnginePool(replicas, probe_every_s=SOON_S)
    yield made
    await made.aclose()


async def ask(engine: EnginePool, rollout: str = "r") -> int:
    """The number of the replica that answered."""
    said = await engine.generate((1, 2), Sampling(), stop_token_ids=(9,), rollout_id=rollout)
    return said.token_ids[0]


async def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(SOON_S / 4)


class TestEnginePool(EngineContract):
    @pytest.fixture
    async def engine(self) -> AsyncIterator[EnginePool]:
        made = EnginePool([ScriptedEngine(lambda _: range(10, 30), max_context=64) for _ in range(2)])
        yield made
        await made.aclose()


def test_a_pool_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        EnginePool([])


async def test_a_rollout_stays_where_it_was_and_new_ones_go_where_least_is_done(three: EnginePool) -> None:
    first = await asyncio.gather(*(ask(three, str(index)) for index in range(30)))
    assert Counter(first) == {0: 10, 1: 10, 2: 10}
    for _ in range(3):
        assert await asyncio.gather(*(ask(three, str(index)) for index in range(30))) == first
    one_by_one = [await ask(three, f"new {index}") for index in range(3)]
    assert sorted(one_by_one) == [0, 1, 2]


async def test_what_one_replica_cannot_do_another_does(three: EnginePool, replicas: list[Replica]) -> None:
    home = await ask(three)
    replicas[home].down = True
    assert await ask(three) != home
    assert (three.taken_out, three.retried) == (1, 1)
    assert three.down == {f"replica {home}": "The scripted engine is down."}
    replicas[home].calls.clear()
    moved = await ask(three)
    assert await ask(three) == moved, "it stays where it went"
    assert replicas[home].calls == []


async def test_a_call_that_only_it_fails_is_not_asked_again(three: EnginePool, replicas: list[Replica]) -> None:
    for replica in replicas:
        replica.refuses = EngineError("not this one")
    with pytest.raises(EngineError, match="not this one"):
        await ask(three)
    assert three.down == {}


async def test_what_one_aborts_is_asked_of_another(three: EnginePool, replicas: list[Replica]) -> None:
    """A server that is told to end aborts what it has begun; when all do, it is the trainer's own doing."""
    replicas[0].aborts = True
    assert await ask(three) in {1, 2}
    assert (three.retried, three.taken_out) == (1, 0)
    for replica in replicas:
        replica.aborts = True
    said = await three.generate((1, 2), Sampling(), stop_token_ids=(9,), rollout_id="r")
    assert (said.finish_reason, len(said.token_ids)) == ("abort", 1)


async def test_when_all_are_down_each_is_named(three: EnginePool, replicas: list[Replica]) -> None:
    for replica in replicas:
        replica.refuses = EngineDownError(f"gone {replica.number}")
        replica.down = True
    with pytest.raises(EngineDownError, match=r"None of the 3 engines .*\n  replica 0: gone 0\n.*gone 1\n.*gone 2"):
        await ask(three)
    assert three.retried == 2
    with pytest.raises(EngineDownError, match="None of the 3"):
        await three.load_weights("folder", 1)
    with pytest.raises(EngineDownError, match="None of the 3"):
        await three.probe()


async def test_each_is_asked_once_for_a_call_however_often_it_comes_back(
    three: EnginePool, replicas: list[Replica]
) -> None:
    for replica in replicas:
        replica.refuses = EngineDownError("this call kills it")
    for _ in range(3):
        with pytest.raises(EngineDownError):
            await ask(three)
        await until(lambda: not three.down)
    assert three.taken_out == 9


async def test_one_that_dies_in_the_middle_loses_nothing(three: EnginePool, replicas: list[Replica]) -> None:
    for replica in replicas:
        replica.latency_s = 0.1
    calls = [asyncio.create_task(ask(three, str(index))) for index in range(60)]
    await asyncio.sleep(0.02)
    replicas[1].down = True
    answers = await asyncio.gather(*calls)
    assert Counter(answers).keys() == {0, 2}
    assert (three.taken_out, three.retried) == (1, 20)


async def test_calls_to_one_that_hangs_are_taken_from_it(three: EnginePool, replicas: list[Replica]) -> None:
    """A vLLM that was told to end keeps the connections of its calls open, and answers nothing else."""
    replicas[0].hangs = replicas[0].down = True
    answers = await asyncio.wait_for(asyncio.gather(*(ask(three, str(index)) for index in range(30))), 10)
    assert Counter(answers).keys() == {1, 2}
    assert (replicas[0].cancelled, three.taken_out) == (10, 1)


async def test_a_cancelled_call_is_cancelled_and_asked_of_nobody_else(
    three: EnginePool, replicas: list[Replica]
) -> None:
    for replica in replicas:
        replica.hangs = True
    call = asyncio.create_task(ask(three))
    await asyncio.sleep(SOON_S)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (sum(replica.cancelled for replica in replicas), three.retried, three.down) == (1, 0, {})


async def test_it_comes_back_when_it_answers(three: EnginePool, replicas: list[Replica]) -> None:
    home = await ask(three)
    replicas[home].down = True
    await ask(three)
    await asyncio.sleep(3 * SOON_S)
    assert list(three.down) == [f"replica {home}"]
    replicas[home].down = False
    await until(lambda: not three.down)
    asked = {await ask(three, f"new {index}") for index in range(9)}
    assert home in asked


async def test_it_comes_back_with_the_weights_that_the_others_were_given(
    three: EnginePool, replicas: list[Replica]
) -> None:
    replicas[2].down = True
    await three.load_weights("step-4", 4)
    assert list(three.down) == ["replica 2"]
    assert three.weight_version == 4
    replicas[2].down = False
    await until(lambda: not three.down)
    assert [replica.loaded for replica in replicas] == [[("step-4", 4)]] * 3


async def test_with_other_weights_it_stays_away(three: EnginePool, replicas: list[Replica]) -> None:
    """The trainer puts the weights into its servers itself: nobody here could give them to one that was away."""
    replicas[0].down = True
    with contextlib.suppress(EngineDownError):
        await three.probe()
    three.set_weight_version(3)
    replicas[0].down = False
    await asyncio.sleep(3 * SOON_S)
    assert "weights of version 0, and the version now is 3" in three.down["replica 0"]
    replicas[0].weight_version = 3
    await until(lambda: not three.down)


async def test_a_replica_that_cannot_load_is_out_until_it_can(three: EnginePool, replicas: list[Replica]) -> None:
    replicas[1].loads = EngineError("disk full")
    await three.load_weights("step-1", 1)
    assert three.down == {"replica 1": "disk full"}
    replicas[1].loads = None
    await until(lambda: not three.down)
    assert replicas[1].loaded == [("step-1", 1)]


async def test_weights_that_no_replica_can_load_are_an_error_and_not_tried_again(
    three: EnginePool, replicas: list[Replica]
) -> None:
    for replica in replicas:
        replica.loads = EngineError("no such folder")
    with pytest.raises(EngineError, match="no such folder"):
        await three.load_weights("nowhere", 1)
    for replica in replicas:
        replica.loads = None
    await until(lambda: not three.down)
    assert [replica.loaded for replica in replicas] == [[]] * 3
    assert (await ask(three), three.weight_version) == (await ask(three), 0)


async def test_none_comes_back_with_old_weights_while_new_ones_are_loaded(
    three: EnginePool, replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(path: str, version: int) -> None:
        begun.set()
        await go_on.wait()
        replicas[0].set_weight_version(version)

    monkeypatch.setattr(replicas[0], "load_weights", slowly)
    replicas[2].down = True
    with contextlib.suppress(EngineDownError):
        await three.probe()
    loading = asyncio.create_task(three.load_weights("step-1", 1))
    await begun.wait()
    replicas[2].down = False
    await asyncio.sleep(3 * SOON_S)
    assert list(three.down) == ["replica 2"]
    go_on.set()
    await loading
    await until(lambda: not three.down)
    assert replicas[2].weight_version == 1


async def test_the_weights_outlive_all_replicas(three: EnginePool, replicas: list[Replica]) -> None:
    await three.load_weights("step-5", 5)
    for replica in replicas:
        replica.down = True
    with pytest.raises(EngineDownError):
        await ask(three)
    for replica in replicas:
        replica.down, replica.weight_version = False, 0  # each was started anew
    assert three.weight_version == 5
    await until(lambda: not three.down)
    assert [replica.weight_version for replica in replicas] == [5, 5, 5]


async def test_the_smallest_context_counts(replicas: list[Replica]) -> None:
    replicas[0].max_context, replicas[1].max_context = 64, 32
    assert EnginePool(replicas).max_context == 32


async def test_only_so_many_rollouts_are_remembered(three: EnginePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "REMEMBERED", 10)
    for index in range(50):
        await ask(three, str(index))
    assert len(three._homes) == 10
    assert list(three._homes)[-1] == "49"


async def test_closing_ends_the_watch_and_the_engines(three: EnginePool, replicas: list[Replica]) -> None:
    await ask(three)
    await three.aclose()
    assert all(replica.closed for replica in replicas)
    assert {task.get_name() for task in asyncio.all_tasks()} == {asyncio.current_task().get_name()}  # type: ignore[union-attr]
    with pytest.raises(EngineError, match="closed"):
        await ask(three)
