"""Records the rollouts of `rollouts.jsonl`, through the real collector, gateway and alignment.

    python tests/parity/record_rollouts.py

Gym and the policy follow a play, told here for each rollout; all that is between them is the core. A rollout's n-th
sampled token has the logprob -n/64: no two are equal, and every float type holds them exactly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import orjson

from gymlink.align import load_format
from gymlink.config import AlignmentSettings, RolloutSettings
from gymlink.engines import ScriptedEngine
from gymlink.errors import GymRequestError
from gymlink.gateway import PolicyService
from gymlink.rollout import Collector
from gymlink.types import Generation, Rollout, RolloutRequest, Sampling
from policy_calls import chat
from recorded_rollouts import FILE, FINAL_BRANCH, FORKED, Groups, recorded_tokenizer, row_of, to_lines

TEMPLATE = """\
{%- if tools -%}
{{ '<|im_start|>system\\n' }}{%- for tool in tools -%}{{ tool.function.name }}{%- endfor -%}{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] -%}
{{ '<tool_call>{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""  # noqa: E501 - a template's lines are its own
PRESS = '<tool_call>{"name": "press", "arguments": {"key": "4"}}</tool_call>'
TOOL = {"name": "press", "parameters": {"type": "object", "properties": {"key": {"type": "string"}}}}

Move = tuple[Literal["says", "is_cut", "is_silent", "user", "tool", "edits", "forgets", "rewinds", "breaks"], str]
"""What happens next: the policy `says` something, `is_cut` after two tokens of it, or `is_silent`; the environment
answers as `user` or `tool`, `edits` its first message, `forgets` what was said, `rewinds` to the first answer, or
`breaks`."""


@dataclass(frozen=True)
class Play:
    """One rollout: its moves, and the reward for them; None where the last move breaks."""

    reward: float | None
    moves: tuple[Move, ...]


def play(reward: float | None, *moves: Move) -> Play:
    return Play(reward, moves if reward is not None else (*moves, ("breaks", "the door is stuck")))


TWO_TURNS: tuple[Move, ...] = (("says", "fox"), ("user", "no"), ("says", "dog"))
LONG = "the lazy dog jumps over the quick brown fox the lazy dog jumps over"
EDITED: tuple[Move, ...] = (*TWO_TURNS, ("edits", "jump"), ("user", "on"), ("says", "lazy"))
FORGOTTEN: tuple[Move, ...] = (*TWO_TURNS, ("forgets", "again"), ("says", "over"), ("user", "no"), ("says", "quick"))
BRANCHED: tuple[Move, ...] = (*TWO_TURNS, ("rewinds", "on"), ("says", "brown"))

PLAYS: Mapping[str, tuple[Play, ...]] = {
    "plain": (
        play(0.0, *TWO_TURNS),
        play(0.25, *TWO_TURNS, ("user", "more"), ("says", "quick brown")),
        play(1.0, ("says", "brown"), ("user", "no"), ("is_cut", "the lazy dog jumps")),
        play(0.5, ("says", "jumps")),
    ),
    "tools": (
        play(1.0, ("says", PRESS), ("tool", "ok"), ("says", "dog")),
        play(0.0, ("says", "<tool_call>press</tool_call>"), ("user", "no"), ("says", "dog")),
        play(0.5, ("says", PRESS), ("tool", "no"), ("says", PRESS), ("tool", "ok"), ("says", "fox")),
        play(0.25, ("says", "dog")),
    ),
    "one_failed": (
        play(1.0, *TWO_TURNS),
        play(None, *TWO_TURNS[:2]),
        play(0.0, ("says", "lazy")),
        play(0.25, ("says", "quick"), ("user", "no"), ("says", "over")),
    ),
    "two_failed": (
        play(None),
        play(0.75, *TWO_TURNS),
        play(None, *TWO_TURNS),
        play(0.0, ("says", "lazy")),
    ),
    "one_scored": (play(None), play(1.0, *TWO_TURNS), play(None, *TWO_TURNS), play(None)),
    "all_failed": (play(None), play(None, *TWO_TURNS), play(None), play(None, ("says", "fox"))),
    "equal": (
        play(0.5, *TWO_TURNS),
        play(0.5, ("says", "lazy")),
        play(0.5, ("says", "over")),
        play(0.5, ("says", "brown"), ("user", "no"), ("says", "fox")),
    ),
    "long": (
        play(1.0, ("says", LONG), ("user", "go"), ("says", LONG)),
        play(0.5, ("says", LONG), ("user", LONG), ("says", "fox")),
        play(0.0, ("says", "fox")),
        play(0.25, *TWO_TURNS),
    ),
    "silent": (
        play(0.0, ("is_silent", "")),
        play(1.0, ("says", "fox")),
        play(0.5, ("says", "dog"), ("user", "no"), ("is_silent", "")),
        play(0.25, *TWO_TURNS),
    ),
    FORKED: (play(1.0, *EDITED), play(0.25, *FORGOTTEN), play(0.0, *BRANCHED), play(None, *EDITED)),
}


@dataclass
class Stage:
    """Stands where Gym's servers stand, and says what the policy samples. One rollout at a time."""

    policy: PolicyService = field(init=False)
    plays: list[Play] = field(default_factory=list)
    line: str = ""
    ends: bool = True

    async def run(self, agent: str, row: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        told = self.plays.pop(0)
        body: dict[str, Any] = orjson.loads(row["responses_create_params"]["metadata"]["extra_body"])
        task = row["responses_create_params"]["input"]
        if task == "tools":
            body["tools"] = [{"type": "function", "function": TOOL}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": task}]
        for kind, text in told.moves:
            await self._move(kind, text, messages, body)
        return {"reward": told.reward, "response": {"output": []}}

    async def _move(self, kind: str, text: str, messages: list[dict[str, Any]], body: dict[str, Any]) -> None:
        match kind:
            case "says" | "is_cut" | "is_silent":
                self.line, self.ends = text, kind != "is_silent"
                limit = {"max_tokens": 2} if kind == "is_cut" else {}
                messages.append(await chat(self.policy, {**body, **limit, "messages": messages}))
            case "tool":
                [call] = messages[-1]["tool_calls"]
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})
            case "user":
                messages.append({"role": "user", "content": text})
            case "edits":
                messages[0] = {"role": "user", "content": text}
            case "forgets" | "rewinds":
                del messages[1 if kind == "forgets" else 2 :]
                messages.append({"role": "user", "content": text})
            case _:
                raise GymRequestError(text, kind="http", status=500)


class Counting(ScriptedEngine):
    """Gives the n-th token that it samples the logprob -n/64. `sampled` is set to 0 where a rollout begins."""

    sampled = 0

    async def generate(self, *given: Any, **named: Any) -> Generation:
        said = await super().generate(*given, **named)
        first = self.sampled + 1
        self.sampled += len(said.token_ids)
        return replace(said, logprobs=tuple(-at / 64 for at in range(first, self.sampled + 1)))


async def _record(plays: Sequence[Play], group: str, history: Literal["fork", "last"]) -> tuple[Rollout, ...]:
    tokenizer = recorded_tokenizer()
    tokenizer.chat_template = TEMPLATE
    stage = Stage()

    def say(_: Sequence[int]) -> list[int]:
        ids: list[int] = tokenizer(stage.line)["input_ids"]
        return [*ids, tokenizer.eos_token_id] if stage.ends else ids

    engine = Counting(say)
    stage.policy = PolicyService(load_format(tokenizer), engine, Sampling())
    collector = Collector(
        stage, stage.policy, RolloutSettings(attempts=1), AlignmentSettings(on_history_rewrite=history)
    )
    rollouts = []
    for index, one in enumerate(plays):
        stage.plays.append(one)
        engine.sampled = 0
        rollouts.append(await collector.rollout(RolloutRequest(row_of(group), index, group=group)))
    return tuple(rollouts)


def record() -> Groups:
    """Every group of `PLAYS`; rewritten histories with either setting."""
    made = {name: asyncio.run(_record(plays, name, "fork")) for name, plays in PLAYS.items()}
    return made | {FINAL_BRANCH: asyncio.run(_record(PLAYS[FORKED], FINAL_BRANCH, "last"))}


if __name__ == "__main__":
    FILE.write_text(to_lines(record()), encoding="utf-8")
    print(f"{FILE} is made anew.")
