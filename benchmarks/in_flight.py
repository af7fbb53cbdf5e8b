"""Many rollouts in flight at once, over HTTP through the real gateway: are any lost, how long do calls wait?

The gateway is a process of its own, with the scripted engine in it, which sleeps as long as it is said to sample; the
client is another one, and keeps a connection open for each rollout. All rollouts begin at the same moment. Their ids
stay at the gateway.

The latency that is added is what the client waits from before it sends a request until it has the answer, without the
engine's time. It is measured with two engines. With a quick one the gateway is the bottleneck: the rate is then what
the gateway can do, and a call waits for its turn behind all others; the utilisation beside it is the share of one core
that the gateway took. The other one answers as a busy GPU does, after seconds that differ from call to call. Then the
same number of long rollouts, for their memory.

A rollout is lost when one of its calls is not answered, or when what the gateway remembers of it is not what its client
was given: as many turns, each but the first an exact extension, and not a token more or less.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import quantiles
from typing import Any

import aiohttp
import orjson
import psutil
from conversation import CODE, PROSE, SECRET, Agent, Text, Turn
from gateway_process import Kept, Script, gateway_process
from report import Line, Result, duration, megabytes, short


@dataclass(frozen=True)
class Play:
    """What all rollouts do, and with which engine. The peak memory is to be below `most_bytes`."""

    engine: str
    least_s: float
    most_s: float
    turns: int = 4
    turn: Turn = field(default_factory=lambda: Turn(sampled=96, observed=96))
    opening: int = 256
    most_bytes: float = 300e6
    timeout_s: float = 300.0

    @property
    def tokens(self) -> int:
        return self.opening + self.turns * (self.turn.sampled + self.turn.observed)


LONG = Play("quick", 0.0, 0.0, 50, Turn(sampled=310, observed=310), 1000, most_bytes=2e9, timeout_s=1800.0)


@dataclass(frozen=True)
class Sizes:
    rollouts: int = 2048
    plays: tuple[Play, ...] = (Play("quick", 0.05, 0.05), Play("busy", 2.0, 10.0), LONG)


SMALL = Sizes(rollouts=16, plays=(Play("busy", 0.01, 0.1),))


@dataclass
class _Seen:
    """What the client saw of one rollout."""

    rollout_id: str
    completion_tokens: int = 0
    added_s: list[float] = field(default_factory=list)


def run(*, small: bool = False) -> Result:
    sizes = SMALL if small else Sizes()
    names = [f"0.{number}" for number in range(sizes.rollouts)]
    rows: list[dict[str, Any]] = []
    lines: list[Line] = []
    for play in sizes.plays:
        script = Script.of(play.turn, play.least_s, play.most_s)
        with gateway_process(names, script) as gateway:
            cpu = psutil.Process(gateway.pid).cpu_times()
            started = time.perf_counter()
            seen = asyncio.run(_play_all(gateway.url, names, play, script))
            seconds = time.perf_counter() - started
            spent = psutil.Process(gateway.pid).cpu_times()
            kept = gateway.finish()
        cpu_s = spent.user + spent.system - cpu.user - cpu.system
        lost = _lost(seen, kept, play)
        added = [one for rollout in seen for one in rollout.added_s]
        p50, p99 = (quantiles(added, n=100)[at - 1] for at in (50, 99))
        calls = sizes.rollouts * play.turns
        rows.append(
            {
                "engine": f"{play.engine}, {play.least_s:g} to {play.most_s:g} s",
                "rollouts": sizes.rollouts,
                "turns": play.turns,
                "tokens": play.tokens,
                "lost": lost,
                "most calls in the engine": kept.most_calls,
                "rollouts/s": sizes.rollouts / seconds,
                "calls/s": calls / seconds,
                "added ms, p50": p50 * 1e3,
                "added ms, p99": p99 * 1e3,
                "gateway CPU ms a call": cpu_s / calls * 1e3,
                "utilisation": cpu_s / seconds,
                "gateway peak MB": kept.peak_bytes / 1e6,
            }
        )
        lines += _lines(play, rows[-1])
    return Result(rows, lines, asdict(sizes))


def _lines(play: Play, row: Mapping[str, float]) -> list[Line]:
    what = f"{row['rollouts']:,} rollouts of {play.turns} turns and {short(play.tokens / 1e3)}k tokens at once"
    engine = f"{play.least_s:g} s" if play.least_s == play.most_s else f"{play.least_s:g} to {play.most_s:g} s"
    p50, p99, peak = row["added ms, p50"] / 1e3, row["added ms, p99"] / 1e3, row["gateway peak MB"] * 1e6
    rate = f"{short(row['rollouts/s'])} rollouts/s at {row['utilisation']:.0%} of a core, {row['lost']} lost"
    return [
        Line(
            f"added latency, {what}, an engine that takes {engine}",
            f"p50 {duration(p50)}, p99 {duration(p99)}, {rate}",
            goal="none lost",
            met=not row["lost"],
        ),
        Line(
            f"peak memory of the gateway's process, {what}",
            megabytes(peak),
            goal=f"below {megabytes(play.most_bytes)}",
            met=peak < play.most_bytes,
        ),
    ]


def _lost(seen: Sequence[_Seen], kept: Kept, play: Play) -> int:
    """Raises `AssertionError` where tokens do not add up: then all figures are worth nothing."""
    told = sum(rollout.completion_tokens for rollout in seen)
    assert kept.sampled_tokens == kept.kept_tokens == told, (kept.sampled_tokens, kept.kept_tokens, told)
    assert kept.exact, "a turn was no exact extension"
    whole = (len(rollout.added_s) == kept.turns[rollout.rollout_id] == play.turns for rollout in seen)
    return len(seen) - sum(whole)


# -- the client --------------------------------------------------------------------------------------------------


async def _play_all(url: str, names: Sequence[str], play: Play, script: Script) -> list[_Seen]:
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {SECRET}", "Content-Type": "application/json"}
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, connector=connector, headers=headers, timeout=timeout) as session:
        async with asyncio.timeout(play.timeout_s):
            agents = [_agent(number, name, play) for number, name in enumerate(names)]
            return await asyncio.gather(*(_play(session, agent, play, script) for agent in agents))


def _agent(number: int, rollout_id: str, play: Play) -> Agent:
    words, pages = Text(PROSE, start=101 * number), Text(CODE, start=101 * number)
    return Agent(rollout_id, play.turn, play.opening, words=words, pages=pages)


async def _play(session: aiohttp.ClientSession, agent: Agent, play: Play, script: Script) -> _Seen:
    seen = _Seen(agent.rollout_id)
    for _ in range(play.turns):
        body = agent.request()
        started = time.perf_counter()
        async with session.post("/v1/chat/completions", data=body) as response:
            content = await response.read()
        waited = time.perf_counter() - started
        if response.status != 200:
            return seen
        answer = orjson.loads(content)
        usage = answer["usage"]
        seen.added_s.append(waited - script.seconds(agent.rollout_id, usage["prompt_tokens"]))
        seen.completion_tokens += usage["completion_tokens"]
        agent.take(answer)
    return seen
