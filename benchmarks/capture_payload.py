"""What a long rollout sends, and what that costs, with its token ids kept at the gateway and with ids on messages.

Capture: the agent sends text and gets text; the ids stay at the gateway, where the trainer takes them. Message fields:
every sampled message carries `prompt_token_ids`, `generation_token_ids` and `generation_log_probs`, which come with the
answer, go back with each later call, and stand in the answer of /run. That is what NeMo Gym 0.4.0 does with
`return_token_id_information: true`.

The payload of a rollout is the bodies of all calls of the policy, of their answers, and of the answer of /run. Its CPU
is that of orjson, which Gym and the gateway use, for writing and reading each of those bodies once. The CPU with the
gateway's has besides all else that the gateway does for the calls, but for the sockets and the engine; most of that is
the same work in both modes. What Gym's own servers spend is in `capture_gym`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import orjson
from conversation import Agent, Gateway, Turn
from report import Line, Result, duration, megabytes, short

LEAST_RATIO = 10.0
IDS_ON_MESSAGES = "token ids on messages"


@dataclass(frozen=True)
class Sizes:
    turns: int = 20
    turn: Turn = field(default_factory=lambda: Turn(sampled=768, observed=768))
    opening: int = 1280
    """With the turns, 32,000 tokens."""
    rollouts: int = 5

    @property
    def tokens(self) -> int:
        return self.opening + self.turns * (self.turn.sampled + self.turn.observed)


SMALL = Sizes(turns=3, rollouts=1)


@dataclass
class _Spent:
    """What one rollout cost; seconds are of CPU."""

    request_bytes: int = 0
    answer_bytes: int = 0
    run_bytes: int = 0
    client_json_s: float = 0.0
    gateway_json_s: float = 0.0
    gateway_s: float = 0.0
    """With its JSON."""

    @property
    def bytes(self) -> int:
        return self.request_bytes + self.answer_bytes + self.run_bytes

    @property
    def json_s(self) -> float:
        return self.client_json_s + self.gateway_json_s

    @property
    def all_s(self) -> float:
        return self.client_json_s + self.gateway_s


def run(*, small: bool = False) -> Result:
    sizes = SMALL if small else Sizes()
    capture: list[_Spent] = []
    fields: list[_Spent] = []
    with Gateway() as gateway:
        for number in range(sizes.rollouts + 1):
            for spent, ids in ((capture, False), (fields, True)):
                agent = Agent(f"{number}-{ids}", sizes.turn, sizes.opening, ids_on_messages=ids)
                spent.append(_rollout(gateway, agent, sizes))
    del capture[0], fields[0]  # the warm-up
    sent = f"a rollout of {sizes.turns} turns and {short(sizes.tokens / 1e3)}k tokens"

    def of(read: Callable[[_Spent], float]) -> list[tuple[float, float]]:
        return [(read(one), read(other)) for one, other in zip(capture, fields, strict=True)]

    return Result(
        [_row("capture", capture), _row("message fields", fields)],
        [
            _line(f"bytes sent for {sent}", megabytes, LEAST_RATIO, of(lambda one: one.bytes)),
            _line("CPU for writing and reading them as JSON", duration, LEAST_RATIO, of(lambda one: one.json_s)),
            _line("the same, with all of the gateway's CPU", duration, 0, of(lambda one: one.all_s)),
        ],
        asdict(sizes),
    )


def _row(mode: str, spent: list[_Spent]) -> dict[str, str | int | float]:
    def middle(read: Callable[[_Spent], float]) -> float:
        return median(map(read, spent))

    return {
        "mode": mode,
        "request MB": middle(lambda one: one.request_bytes / 1e6),
        "answer MB": middle(lambda one: one.answer_bytes / 1e6),
        "/run MB": middle(lambda one: one.run_bytes / 1e6),
        "client JSON ms": middle(lambda one: one.client_json_s * 1e3),
        "gateway JSON ms": middle(lambda one: one.gateway_json_s * 1e3),
        "gateway ms": middle(lambda one: one.gateway_s * 1e3),
    }


def _line(measured: str, unit: Callable[[float], str], goal: float, values: Sequence[tuple[float, float]]) -> Line:
    """`values`: of each rollout, in capture mode and with message fields."""
    ours, theirs = (median(mode) for mode in zip(*values, strict=True))
    ratio = theirs / ours
    compared = f"{IDS_ON_MESSAGES}: {unit(theirs)}"
    return Line(measured, unit(ours), compared, ratio, f"{goal:g} times" if goal else "", ratio >= goal)


def _rollout(gateway: Gateway, agent: Agent, sizes: Sizes) -> _Spent:
    spent = _Spent()
    gateway.service.open(agent.rollout_id)
    for _ in range(sizes.turns):
        sampled = agent.sample()
        body, writing = _timed(agent.request)
        content, answering = gateway.call(body, sampled)
        answer, reading = _timed(lambda content=content: orjson.loads(content))
        agent.take(answer)
        spent.request_bytes += len(body)
        spent.answer_bytes += len(content)
        spent.client_json_s += writing + reading
        spent.gateway_json_s += _timed(lambda body=body: orjson.loads(body))[1]
        spent.gateway_json_s += _timed(lambda answer=answer: orjson.dumps(answer))[1]
        spent.gateway_s += answering
    record = gateway.service.close(agent.rollout_id).record
    assert len(record.turns) == sizes.turns
    assert all(turn.parent is not None for turn in record.turns[1:]), "a turn was no exact extension"
    result, writing = _timed(lambda: orjson.dumps({"reward": 1.0, "response": {"output": agent.messages}}))
    _, reading = _timed(lambda: orjson.loads(result))
    spent.run_bytes = len(result)
    spent.client_json_s += writing + reading
    return spent


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    made = work()
    return made, time.process_time() - started
