"""The recorded rollouts, as the core made them: `rollouts.jsonl`, one rollout a line, siblings in order.

A line holds all that a plugin may look at, and no more: ids, times and the words of failures differ from run to run.
`record_rollouts.py` makes the file anew, and a test sees that it would come out the same.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gymlink.types import ForkCause, Packed, Rollout, RolloutRequest, RolloutStatus, Sampling, Segment, Turn
from gymlink_tiny import make_tokenizer

FILE = Path(__file__).with_name("rollouts.jsonl")
SIBLINGS = 4
RESPONSE_LIMIT = 36
"""Tokens that a response may have in these tests. One has just as many; others have more, and are cut where the policy
speaks or where the environment does."""

UNCOMPARABLE = ("one_scored", "all_failed")
"""Groups in which fewer than two rollouts were scored."""
FORKED, FINAL_BRANCH = "rewritten_fork", "rewritten_last"
"""The same plays, recorded with either setting of `on_history_rewrite`."""

Groups = Mapping[str, tuple[Rollout, ...]]


def recorded_tokenizer() -> Any:
    """The tokenizer of the recorded ids; its `eos_token_id` is 2. It has short words for a short file."""
    words = ["system user assistant tool", '<tool_call>{"name": "press", "arguments": {"key": "4"}}</tool_call>']
    return make_tokenizer([*words, "the quick brown fox jumps over the lazy dog"], vocab_size=420)


def read_rollouts() -> Groups:
    """The siblings of each group, by the group's name."""
    groups: dict[str, list[Rollout]] = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        known = json.loads(line)
        siblings = groups.setdefault(known["group"], [])
        siblings.append(_rollout(known, index=len(siblings)))
    return {name: tuple(siblings) for name, siblings in groups.items()}


class RecordedWorker:
    """Stands where `gymlink.worker.RolloutWorker` stands: a row gets its group's rollouts, one after the other."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._asked: Counter[str] = Counter()

    async def rollout(self, request: RolloutRequest, *, sampling: Sampling) -> Rollout:
        group = request.row["responses_create_params"]["input"]
        index = self._asked[group]
        self._asked[group] += 1
        await asyncio.sleep(0.002 * (SIBLINGS - index))  # the first to begin ends last
        return replace(self._groups[group][index], request=request)


def to_lines(groups: Groups) -> str:
    """The file that `read_rollouts` reads."""
    return "".join(f"{json.dumps(_known(name, one))}\n" for name, siblings in groups.items() for one in siblings)


def row_of(group: str) -> dict[str, Any]:
    """The Gym row that stands for a group."""
    return {"responses_create_params": {"input": group}, "agent_ref": {"name": "agent"}}


def _known(group: str, rollout: Rollout) -> dict[str, Any]:
    return {
        "group": group,
        "status": rollout.status.value,
        "reward": rollout.reward,
        "failure": rollout.failure,
        "sampled_tokens": rollout.sampled_tokens,
        "dropped": dict(rollout.dropped),
        "turns": [_some(one, ("prompt_ids", "completion_ids", "logprobs", *_TURN)) for one in rollout.turns],
        "segments": [_some(one, _SEGMENT) for one in rollout.segments],
    }


_TURN = ("finish_reason", "parent", "cause")
_SEGMENT = ("prompt_ids", "response_ids", "response_mask", "response_logprobs", "turns")


def _some(one: Turn | Segment, names: Iterable[str]) -> dict[str, Any]:
    values = {name: getattr(one, name) for name in names}
    return {name: value.tolist() if isinstance(value, Packed) else value for name, value in values.items()}


def _rollout(known: Mapping[str, Any], *, index: int) -> Rollout:
    return Rollout(
        RolloutRequest(row_of(known["group"]), index, group=known["group"]),
        f"0.{known['group']}-{index}",
        RolloutStatus(known["status"]),
        known["reward"],
        segments=tuple(Segment(**{**one, "turns": tuple(one["turns"])}) for one in known["segments"]),
        turns=_turns(known["turns"]),
        failure=known["failure"],
        detail=known["failure"],
        sampled_tokens=known["sampled_tokens"],
        dropped=known["dropped"],
    )


def _turns(known: Sequence[Mapping[str, Any]]) -> tuple[Turn, ...]:
    """Whole prompts are in the file; a turn holds what it adds to its parent's ids."""
    turns: list[Turn] = []
    for index, one in enumerate(known):
        extends = None if one["parent"] is None else turns[one["parent"]]
        held = list(extends.ids) if extends else []
        assert one["prompt_ids"][: len(held)] == held
        turns.append(
            Turn(
                one["prompt_ids"][len(held) :],
                one["completion_ids"],
                one["logprobs"],
                one["finish_reason"],
                extends=extends,
                cause=None if one["cause"] is None else ForkCause(one["cause"]),
                index=index,
            )
        )
    return tuple(turns)
