"""What a turn costs the gateway in CPU time, by length of the history, against rendering the history twice.

Ours is all that the gateway does for a call, but for the sockets and the engine: the secret, the body's JSON and its
checks, finding what the messages continue, rendering and encoding the new ones, decoding and parsing what was sampled,
remembering it, and the answer's JSON. The engine hands out a generation that lies ready.

The other way is only the two renders with which a bridge finds its place: the whole conversation, and the
conversation up to the last sampled message, each rendered by the same template and encoded by the same tokenizer.
It parses no request and answers none.

Several rollouts are played, turn by turn, up to the length; the turns that come next are measured. After those of each
rollout, the other way does the same ones, so that a busy machine slows both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from statistics import fmean, median

import orjson
from conversation import TOOLS, Agent, Gateway, Turn, tokenizer
from report import Line, Result, duration, short

from gymlink.types import Message

LEAST_RATIOS = {35_000: 120.0, 130_000: 150.0}


@dataclass(frozen=True)
class Sizes:
    histories: tuple[int, ...] = (2_000, 10_000, 35_000, 130_000)
    turn: Turn = field(default_factory=lambda: Turn(sampled=256, observed=512))
    rollouts: int = 8
    measured_turns: int = 3
    """Of each rollout: few, since each makes the history longer."""


SMALL = Sizes(histories=(1_000, 2_000), rollouts=1)


@dataclass(frozen=True)
class _Cost:
    """CPU seconds of the same turn, both ways."""

    ours: float
    double_render: float
    history: int
    """Tokens."""
    turns_before: int


def run(*, small: bool = False) -> Result:
    sizes = SMALL if small else Sizes()
    rows, lines = [], []
    with Gateway() as gateway:
        _play(gateway, "warm-up", sizes.histories[0], sizes)
        for length in sizes.histories:
            played = (_play(gateway, f"{length}-{number}", length, sizes) for number in range(sizes.rollouts))
            costs = list(chain.from_iterable(played))
            ours = [cost.ours for cost in costs]
            theirs = [cost.double_render for cost in costs]
            ratio = median(theirs) / median(ours)
            rows.append(
                {
                    "history tokens": median(cost.history for cost in costs),
                    "turns before": costs[0].turns_before,
                    "turn ms, p50": median(ours) * 1e3,
                    "turn ms, best": min(ours) * 1e3,
                    "turn ms, mean": fmean(ours) * 1e3,
                    "double render ms, p50": median(theirs) * 1e3,
                    "double render ms, best": min(theirs) * 1e3,
                    "ratio of p50": ratio,
                    "ratio of best": min(theirs) / min(ours),
                }
            )
            least = LEAST_RATIOS.get(length, 0.0)
            measured = f"gateway CPU for a turn after {short(length / 1e3)}k tokens"
            compared = f"double render: {duration(median(theirs))}"
            goal = f"{least:g} times" if least else ""
            lines.append(Line(measured, duration(median(ours)), compared, ratio, goal, ratio >= least))
    return Result(rows, lines, asdict(sizes))


def _play(gateway: Gateway, rollout_id: str, length: int, sizes: Sizes) -> list[_Cost]:
    """The costs of the turns that follow once the history has `length` tokens."""
    agent = Agent(rollout_id, sizes.turn)
    rollout = gateway.service.open(rollout_id)
    turns: list[tuple[float, int, Sequence[Message]]] = []
    while len(turns) < sizes.measured_turns:
        content, seconds = gateway.call(agent.request(), agent.sample())
        answer = orjson.loads(content)
        history = answer["usage"]["prompt_tokens"]
        if history >= length:
            turns.append((seconds, history, agent.messages))
        agent.take(answer)
    gateway.service.close(rollout_id)
    assert all(turn.parent is not None for turn in rollout.record.turns[1:]), "a turn was no exact extension"
    before = len(rollout.record.turns) - sizes.measured_turns
    return [_Cost(seconds, _double_render(messages), history, before) for seconds, history, messages in turns]


def _double_render(conversation: Sequence[Message]) -> float:
    """CPU seconds. The conversation ends with the tool's answer; before that stands what was sampled last."""
    started = time.process_time()
    for messages, prompt in ((conversation, True), (conversation[:-1], False)):
        text = tokenizer().apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=prompt)
        tokenizer().encode(text, add_special_tokens=False)
    return time.process_time() - started
