"""Many rollouts in flight at once, over HTTP through the real gateway: are any lost, how long do calls wait?

The gateway is a process of its own, with the scripted engine in it, which sleeps as long as it is said to sample; the
client is another one, and keeps a connection open for each rollout. All rollouts begin at the same moment. Their ids
stay at the gateway.

The latency that is added is what the client waits from before it sends a request until it has the answer, without the
engine's time. It is measured with two engines. With a quick one the gateway is the bottleneck: the rate is then what
the gateway can do, and a call waits for its turn behind all others. The other one answers as a busy GPU does, after
seconds that differ from call to call.

A rollout is lost when one of its calls is not answered, or when what the gateway remembers of it is not what its client
was given: as many turns, each but the first an exact extension, and not a token more or less.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from random import Random
from statistics import quantiles

import aiohttp
import orjson
from conversation import CODE, PROSE, SECRET, Agent, Text, Turn, tokenizer
from report import Line, Result, duration, megabytes, short

from gymlink.align import load_format
from gymlink.config import GatewaySettings
from gymlink.engines import ScriptedEngine
from gymlink.gateway import GatewayServer, PolicyService, create_app
from gymlink.types import Generation, Sampling

MOST_BYTES = 1e9
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Sizes:
    rollouts: int = 2048
    turns: int = 4
    turn: Turn = field(default_factory=lambda: Turn(sampled=96, observed=96))
    opening: int = 256
    engines: tuple[tuple[str, float, float], ...] = (("quick", 0.05, 0.05), ("busy", 2.0, 10.0))
    """Name, and the least and the most seconds in which it answers."""


SMALL = Sizes(rollouts=16, engines=(("busy", 0.01, 0.1),))


@dataclass(frozen=True)
class _Kept:
    """What the gateway's process tells at the end."""

    turns: dict[str, int]
    """By rollout."""
    exact: bool
    """Whether each turn but a rollout's first extends another."""
    sampled_tokens: int
    """Counted at the engine."""
    kept_tokens: int
    """Counted in the rollouts' turns."""
    most_calls: int
    """In the engine at once."""
    cpu_s: float
    peak_bytes: int


@dataclass
class _Seen:
    """What the client saw of one rollout."""

    rollout_id: str
    completion_tokens: int = 0
    added_s: list[float] = field(default_factory=list)


def run(*, small: bool = False) -> Result:
    sizes = SMALL if small else Sizes()
    rows, lines = [], []
    for name, least, most in sizes.engines:
        with _gateway(sizes, least, most) as (pipe, url):
            started = time.perf_counter()
            seen = asyncio.run(_play_all(url, sizes, least, most))
            seconds = time.perf_counter() - started
            pipe.send("done")
            kept: _Kept = pipe.recv()
        lost = _lost(seen, kept, sizes)
        calls = sizes.rollouts * sizes.turns
        added = [one for rollout in seen for one in rollout.added_s]
        p50, p99 = (quantiles(added, n=100)[at - 1] for at in (50, 99))
        rows.append(
            {
                "engine": f"{name}, {least:g} to {most:g} s",
                "rollouts": sizes.rollouts,
                "lost": lost,
                "most calls in the engine": kept.most_calls,
                "rollouts/s": sizes.rollouts / seconds,
                "calls/s": calls / seconds,
                "added ms, p50": p50 * 1e3,
                "added ms, p99": p99 * 1e3,
                "gateway CPU ms a call": kept.cpu_s / calls * 1e3,
                "gateway peak MB": kept.peak_bytes / 1e6,
            }
        )
        told = f"p50 {duration(p50)}, p99 {duration(p99)}, {short(sizes.rollouts / seconds)} rollouts/s, {lost} lost"
        engine = f"{least:g} s" if least == most else f"{least:g} to {most:g} s"
        measured = (
            f"added latency, {sizes.rollouts:,} rollouts of {sizes.turns} turns at once, an engine that takes {engine}"
        )
        lines.append(Line(measured, told, goal="none lost", met=lost == 0))
    peak = max(float(row["gateway peak MB"]) for row in rows) * 1e6
    goal = f"below {megabytes(MOST_BYTES)}"
    lines.append(
        Line("peak memory of the gateway's process meanwhile", megabytes(peak), goal=goal, met=peak < MOST_BYTES)
    )
    return Result(rows, lines, asdict(sizes))


def _lost(seen: Sequence[_Seen], kept: _Kept, sizes: Sizes) -> int:
    """Raises `AssertionError` where tokens do not add up: then all figures are worth nothing."""
    told = sum(rollout.completion_tokens for rollout in seen)
    assert kept.sampled_tokens == kept.kept_tokens == told, (kept.sampled_tokens, kept.kept_tokens, told)
    assert kept.exact, "a turn was no exact extension"
    whole = (len(rollout.added_s) == kept.turns[rollout.rollout_id] == sizes.turns for rollout in seen)
    return sizes.rollouts - sum(whole)


def _rollout_ids(sizes: Sizes) -> list[str]:
    return [f"0.{number}" for number in range(sizes.rollouts)]


def _engine_s(rollout_id: str, prompt_tokens: int, least: float, most: float) -> float:
    """How long the engine takes for a call; client and engine both know it."""
    return Random(f"{rollout_id}/{prompt_tokens}").uniform(least, most)


# -- the client --------------------------------------------------------------------------------------------------


async def _play_all(url: str, sizes: Sizes, least: float, most: float) -> list[_Seen]:
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {SECRET}", "Content-Type": "application/json"}
    async with aiohttp.ClientSession(url, connector=connector, headers=headers) as session:
        async with asyncio.timeout(TIMEOUT_S):
            agents = [_agent(number, name, sizes) for number, name in enumerate(_rollout_ids(sizes))]
            return await asyncio.gather(*(_play(session, agent, sizes, least, most) for agent in agents))


def _agent(number: int, rollout_id: str, sizes: Sizes) -> Agent:
    words, pages = Text(PROSE, start=101 * number), Text(CODE, start=101 * number)
    return Agent(rollout_id, sizes.turn, sizes.opening, words=words, pages=pages)


async def _play(session: aiohttp.ClientSession, agent: Agent, sizes: Sizes, least: float, most: float) -> _Seen:
    seen = _Seen(agent.rollout_id)
    for _ in range(sizes.turns):
        body = agent.request()
        started = time.perf_counter()
        async with session.post("/v1/chat/completions", data=body) as response:
            content = await response.read()
        waited = time.perf_counter() - started
        if response.status != 200:
            return seen
        answer = orjson.loads(content)
        usage = answer["usage"]
        seen.added_s.append(waited - _engine_s(agent.rollout_id, usage["prompt_tokens"], least, most))
        seen.completion_tokens += usage["completion_tokens"]
        agent.take(answer)
    return seen


# -- the gateway's process ---------------------------------------------------------------------------------------


@contextmanager
def _gateway(sizes: Sizes, least: float, most: float) -> Iterator[tuple[Connection, str]]:
    """A gateway in a process of its own; a pipe to it, and its URL. It ends when the pipe is closed."""
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=_serve, args=(theirs, sizes, least, most), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours, ours.recv()
    finally:
        ours.close()
        process.join(10)
        process.kill()


def _serve(pipe: Connection, sizes: Sizes, least: float, most: float) -> None:
    asyncio.run(_serve_until_told(pipe, sizes, least, most))


async def _serve_until_told(pipe: Connection, sizes: Sizes, least: float, most: float) -> None:
    engine = _Engine(Agent("script", sizes.turn).sample(), least, most)
    service = PolicyService(load_format(tokenizer()), engine, Sampling())
    server = GatewayServer(create_app(service, SECRET), GatewaySettings())
    names = _rollout_ids(sizes)
    for name in names:
        service.open(name)
    await server.start()
    started = time.process_time()
    pipe.send(server.url)
    try:
        await asyncio.to_thread(pipe.recv)
    except EOFError:  # the client has gone
        return
    cpu_s = time.process_time() - started
    records = {name: service.close(name).record for name in names}
    turns = {name: len(record.turns) for name, record in records.items()}
    pipe.send(
        _Kept(
            turns=turns,
            exact=all(turn.parent is not None for record in records.values() for turn in record.turns[1:]),
            sampled_tokens=service.totals.attributed_tokens,
            kept_tokens=sum(len(turn.completion_ids) for record in records.values() for turn in record.turns),
            most_calls=engine.most_calls,
            cpu_s=cpu_s,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
    )
    await server.stop()


class _Engine(ScriptedEngine):
    """Always samples the same, after as long as it takes."""

    def __init__(self, sampled: Generation, least: float, most: float) -> None:
        super().__init__(lambda _: sampled.token_ids)
        self._least, self._most = least, most
        self._calls_now = 0
        self.most_calls = 0

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, stop_token_ids: Sequence[int], rollout_id: str
    ) -> Generation:
        self._calls_now += 1
        self.most_calls = max(self.most_calls, self._calls_now)
        await asyncio.sleep(_engine_s(rollout_id, len(prompt_ids), self._least, self._most))
        self._calls_now -= 1
        return await super().generate(prompt_ids, sampling, stop_token_ids=stop_token_ids, rollout_id=rollout_id)
