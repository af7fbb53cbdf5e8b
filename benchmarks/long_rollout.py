"""What a long rollout holds in memory while it is in flight, and what it writes to `rollouts.jsonl`.

One agent calls a tool in each of 200 turns, up to 138k tokens. Counted is everything that the gateway holds for the
rollout, object by object, but for the messages: its ids and logprobs, the turns around them, and what its history is
known by. The file's line is that of `record: full`, with all messages.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from sys import getsizeof
from typing import Any

import orjson
from conversation import Agent, Gateway, Turn
from report import Line, Result, megabytes, short

from gymlink.align import build_segments
from gymlink.gateway import OpenRollout
from gymlink.rollout import Recorder
from gymlink.types import Rollout, RolloutRequest, RolloutStatus

MOST_BYTES_A_TOKEN = 16.0


@dataclass(frozen=True)
class Sizes:
    turns: tuple[int, ...] = (60, 200)
    turn: Turn = field(default_factory=lambda: Turn(sampled=344, observed=344))
    opening: int = 512


SMALL = Sizes(turns=(3, 6))


def run(*, small: bool = False) -> Result:
    sizes = SMALL if small else Sizes()
    rows, lines = [], []
    with Gateway() as gateway:
        for turns in sizes.turns:
            rollout = _play(gateway, f"{turns} turns", turns, sizes)
            tokens = rollout.record.turns[-1].tokens
            held, written = _held(rollout, apart=gateway.service.chat_format), len(_line(rollout))
            rows.append(
                {
                    "turns": turns,
                    "tokens": tokens,
                    "held MB": held / 1e6,
                    "held bytes a token": held / tokens,
                    "written MB": written / 1e6,
                    "written bytes a token": written / tokens,
                }
            )
        what = f"a rollout of {turns} turns and {short(tokens / 1e3)}k tokens"
    least, most = rows[0]["held bytes a token"], rows[-1]["held bytes a token"]
    lines.append(
        Line(
            f"memory of {what} in flight, without its messages",
            f"{megabytes(held)}, {short(most)} bytes a token",
            f"of {sizes.turns[0]} turns: {short(least)} bytes a token",
            goal=f"at most {MOST_BYTES_A_TOKEN:g} bytes a token",
            met=most <= MOST_BYTES_A_TOKEN,
        )
    )
    lines.append(Line("its line in rollouts.jsonl", f"{megabytes(written)}, {short(written / tokens)} bytes a token"))
    return Result(rows, lines, asdict(sizes))


def _play(gateway: Gateway, rollout_id: str, turns: int, sizes: Sizes) -> OpenRollout:
    agent = Agent(rollout_id, sizes.turn, sizes.opening)
    rollout = gateway.service.open(rollout_id)
    for _ in range(turns):
        content, _seconds = gateway.call(agent.request(), agent.sample())
        agent.take(orjson.loads(content))
    assert [turn.parent for turn in rollout.record.turns] == [None, *range(turns - 1)], "a turn was no extension"
    return rollout


def _held(root: object, *, apart: object) -> int:
    """Bytes of all that can be reached from here, but for texts, messages, code and what stands `apart`."""
    seen, waiting, total = {id(apart)}, [root], 0
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type | str) or callable(one) or _is_message(one):
            continue
        seen.add(id(one))
        total += getsizeof(one)
        waiting += gc.get_referents(one)
    return total


def _is_message(one: object) -> bool:
    return isinstance(one, Mapping) and ("role" in one or "function" in one)


def _line(rollout: OpenRollout) -> bytes:
    turns = rollout.record.turns
    segments, dropped = build_segments(turns, on_history_rewrite="fork")
    row: dict[str, Any] = {"responses_create_params": {"input": []}, "agent_ref": {"name": "agent"}}
    told = Rollout(
        RolloutRequest(row, 0),
        rollout.record.rollout_id,
        RolloutStatus.COMPLETED,
        1.0,
        segments=segments,
        turns=turns,
        sampled_tokens=rollout.sampled_tokens,
        dropped=dropped,
    )
    return Recorder(Path("unused")).line(told, batch=0)
