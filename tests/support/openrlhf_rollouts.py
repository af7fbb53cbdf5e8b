"""Rollouts as the core makes them, for the tests of OpenRLHF's plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from gymlink.align import build_segments
from gymlink.types import Rollout, RolloutRequest, RolloutStatus
from whole_turns import WholeTurn, linked

ROW = {"responses_create_params": {"input": "go"}, "agent_ref": {"name": "agent"}}

_ids = st.lists(st.integers(0, 50), max_size=4).map(tuple)


def turn(prompt: Sequence[int], said: Sequence[int], parent: int | None = None) -> WholeTurn:
    return WholeTurn(tuple(prompt), tuple(said), tuple(-0.25 * (at + 1) for at in range(len(said))), parent)


def scored(
    reward: float | None, told: Sequence[WholeTurn] = (), *, name: str = "0.r", history: Any = "last", **more: Any
) -> Rollout:
    """A rollout with this reward; by default of one turn of three tokens after a prompt of two."""
    turns = linked(told or [turn((1, 2), (3, 4, 5))])
    segments, dropped = build_segments(turns, on_history_rewrite=history, last_turn=more.pop("last", None))
    return Rollout(
        RolloutRequest(ROW, 0, "g"),
        name,
        more.pop("status", RolloutStatus.COMPLETED),
        reward,
        segments=segments,
        turns=turns,
        sampled_tokens=sum(len(one.completion_ids) for one in turns),
        dropped=dropped,
        **more,
    )


def failed(told: Sequence[WholeTurn] = (), *, name: str = "0.f") -> Rollout:
    turns = linked(told)
    sampled = sum(len(one.completion_ids) for one in turns)
    return Rollout(
        RolloutRequest(ROW, 0, "g"),
        name,
        RolloutStatus.FAILED,
        None,
        turns=turns,
        failure="http",
        detail="the door is stuck",
        sampled_tokens=sampled,
        dropped={"failed": sampled} if sampled else {},
    )


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    """Any tree of turns that gives one sample, ending in any of its turns."""
    turns: list[WholeTurn] = []
    for index in range(draw(st.integers(1, 6))):
        parent = draw(st.one_of(st.none(), st.integers(0, index - 1))) if index else None
        added = draw(_ids)
        prompt = (1, *added) if parent is None else (*turns[parent].prompt, *turns[parent].said, *added)
        turns.append(turn(prompt, draw(_ids), parent=parent))
    last = draw(st.integers(0, len(turns) - 1))
    status = draw(st.sampled_from([RolloutStatus.COMPLETED, RolloutStatus.TRUNCATED]))
    return scored(0.5, turns, history=draw(st.sampled_from(["last", "mask"])), last=last, status=status)
