"""What a long rollout costs in a real NeMo Gym, all processes together, with and without token ids on its messages.

One after the other, a Gym is started in each mode of `gateway.token_ids`, with the environment in environments/: it
answers each turn with a page of text. Counted is the CPU time of Gym's three servers (agent, model server, environment)
and of our process, which holds the gateway and the collector, while the rollouts are collected. Much of it is spent on
what both modes have in common: five HTTP calls for each turn.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from capture_payload import IDS_ON_MESSAGES
from conversation import CODE, PROSE, Text, Turn, tokenizer
from report import Line, Result, duration, short
from running_gym import collect, cpu_s, gym_of, running, settings

from gymlink.session import Session
from gymlink.types import RolloutRequest

ENVIRONMENTS = Path(__file__).parent / "environments"
SERVERS = {"pages": "environment", "pages_agent": "agent", "policy_model": "model server"}
CHARACTERS_PER_TOKEN = 3.9
"""Of the page's text, with the benchmarks' tokenizer."""


@dataclass(frozen=True)
class Sizes:
    turns: int = 20
    turn: Turn = field(default_factory=lambda: Turn(sampled=768, observed=768))
    opening: int = 1280
    """With the turns, 32,000 tokens."""
    rollouts: int = 12
    at_once: int = 4


SMALL = Sizes(turns=2, rollouts=2)


def run(*, small: bool = False) -> Result:
    sizes = SMALL if small else Sizes()
    sampled = tokenizer().encode(Text(PROSE).take(sizes.turn.sampled - 1) + "<|im_end|>", add_special_tokens=False)
    spent = {}
    for mode in ("gateway", "messages"):
        asked = settings(ENVIRONMENTS, "pages", concurrency=sizes.at_once, token_ids=mode)
        with running(asked, sampled) as session:
            spent[mode] = _cpu_per_rollout(session, sizes)
    rows = [{"token ids": mode, **{f"{who} ms": one * 1e3 for who, one in by.items()}} for mode, by in spent.items()]
    ours, theirs = (sum(by.values()) for by in spent.values())
    tokens = sizes.opening + sizes.turns * (sizes.turn.sampled + sizes.turn.observed)
    measured = f"CPU of Gym's servers and ours for a rollout of {sizes.turns} turns and {short(tokens / 1e3)}k tokens"
    compared = f"{IDS_ON_MESSAGES}: {duration(theirs)}"
    return Result(rows, [Line(measured, duration(ours), compared, theirs / ours)], asdict(sizes))


def _cpu_per_rollout(session: Session, sizes: Sizes) -> dict[str, float]:
    """Seconds, by process."""
    row = {
        "responses_create_params": {"input": [{"role": "user", "content": Text(CODE).take(sizes.opening)}]},
        "agent_ref": {"type": "responses_api_agents", "name": "pages_agent"},
        "turns": sizes.turns,
        "characters": round(sizes.turn.observed * CHARACTERS_PER_TOKEN),
    }
    collect(session, [RolloutRequest(row, number) for number in range(sizes.at_once)])  # warms up
    before = _cpu(session)
    batch = collect(session, [RolloutRequest(row, number) for number in range(sizes.rollouts)])
    after = _cpu(session)
    assert all(len(rollout.turns) == sizes.turns for rollout in batch.rollouts)
    return {who: (after[who] - before[who]) / sizes.rollouts for who in after}


def _cpu(session: Session) -> dict[str, float]:
    pids = {SERVERS[name]: server.pid for name, server in gym_of(session).servers.items()}
    by_server = {who: cpu_s(pid) for who, pid in pids.items() if pid is not None}
    return {**by_server, "gateway and collector": time.process_time()}
