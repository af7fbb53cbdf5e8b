"""A gateway in a process of its own, with the scripted engine in it, and what it tells at the end.

It is started with what a gateway is started with, and no more: a tokenizer in a folder. So its memory is a gateway's.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from conversation import SECRET, Agent, Turn, tokenizer

from gymlink.align import load_format
from gymlink.config import GatewaySettings
from gymlink.engines import ScriptedEngine
from gymlink.gateway import GatewayServer, PolicyService, create_app
from gymlink.serve.memory import return_large_buffers
from gymlink.types import Generation, Sampling


@dataclass(frozen=True)
class Script:
    """What the engine samples, whatever it is asked, and the least and the most seconds that it takes for it."""

    token_ids: Sequence[int]
    least_s: float = 0.0
    most_s: float = 0.0

    @classmethod
    def of(cls, turn: Turn, least_s: float = 0.0, most_s: float = 0.0) -> Script:
        return cls(Agent("script", turn).sample().token_ids.tolist(), least_s, most_s)

    def seconds(self, rollout_id: str, prompt_tokens: int) -> float:
        """How long the engine takes for a call; client and engine both know it."""
        return Random(f"{rollout_id}/{prompt_tokens}").uniform(self.least_s, self.most_s)


@dataclass(frozen=True)
class Kept:
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
    peak_bytes: int


@dataclass(frozen=True)
class Running:
    """A gateway's process: where it is reached, and its pipe."""

    url: str
    pid: int
    pipe: Connection

    def finish(self) -> Kept:
        """Close its rollouts."""
        self.pipe.send("done")
        kept: Kept = self.pipe.recv()
        return kept


@contextmanager
def gateway_process(rollout_ids: Sequence[str], script: Script) -> Iterator[Running]:
    """A gateway at which these rollouts are open. It ends when its pipe is closed."""
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer().save_pretrained(folder)
        process = spawning.Process(target=_serve, args=(theirs, folder, rollout_ids, script), daemon=True)
        process.start()
        theirs.close()
        try:
            yield Running(ours.recv(), process.pid or 0, ours)
        finally:
            ours.close()
            process.join(10)
            process.kill()


def _serve(pipe: Connection, folder: str, rollout_ids: Sequence[str], script: Script) -> None:
    asyncio.run(_serve_until_told(pipe, folder, rollout_ids, script))


async def _serve_until_told(pipe: Connection, folder: str, rollout_ids: Sequence[str], script: Script) -> None:
    return_large_buffers()  # as `gymlink serve` does
    engine = _Engine(script)
    service = PolicyService(load_format(_loaded(folder)), engine, Sampling())
    server = GatewayServer(create_app(service, SECRET), GatewaySettings())
    for name in rollout_ids:
        service.open(name)
    await server.start()
    pipe.send(server.url)
    try:
        await asyncio.to_thread(pipe.recv)
    except EOFError:  # the client has gone
        return
    peak_bytes = _peak_bytes()
    records = {name: service.close(name).record for name in rollout_ids}
    pipe.send(
        Kept(
            turns={name: len(record.turns) for name, record in records.items()},
            exact=all(turn.parent is not None for record in records.values() for turn in record.turns[1:]),
            sampled_tokens=service.totals.attributed_tokens,
            kept_tokens=sum(len(turn.completion_ids) for record in records.values() for turn in record.turns),
            most_calls=engine.most_calls,
            peak_bytes=peak_bytes,
        )
    )
    await server.stop()


def _peak_bytes() -> int:
    """The most memory that this process ever held. (`ru_maxrss` would be at least what its parent held.)"""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def _loaded(folder: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(Path(folder))


class _Engine(ScriptedEngine):
    """Always samples the same, after as long as it takes."""

    def __init__(self, script: Script) -> None:
        super().__init__(lambda _: script.token_ids, keep_calls=False)
        self._seconds = script.seconds
        self._calls_now = 0
        self.most_calls = 0

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, stop_token_ids: Sequence[int], rollout_id: str
    ) -> Generation:
        self._calls_now += 1
        self.most_calls = max(self.most_calls, self._calls_now)
        if seconds := self._seconds(rollout_id, len(prompt_ids)):
            await asyncio.sleep(seconds)
        self._calls_now -= 1
        return await super().generate(prompt_ids, sampling, stop_token_ids=stop_token_ids, rollout_id=rollout_id)
