"""From a rollout to what verl trains: one `AgentLoopOutput` for each branch of its history.

Each sampled token is trained in one output, or counted under the reason why not. The last output is the branch that
ends in the final response; it carries the reward, which verl's V1 trainer gives to the others too, taking only the last
into the baseline of the group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput

from gymlink.rollout import Figures
from gymlink.types import DropReason, Logprobs, Mask, Rollout, RolloutStatus, Segment, TokenIds, Turn


@dataclass(frozen=True, slots=True)
class Shape:
    """How long a row may be. `padded` is the legacy trainer, whose rows have one shape: a longer prompt does not fit.

    `end` is the token that stands, masked, where a response would be empty.
    """

    prompt_length: int
    response_length: int
    end: int
    padded: bool = False


def outputs_of(rollout: Rollout, shape: Shape) -> tuple[list[AgentLoopOutput], Figures]:
    """What verl gets for a rollout that was scored, and its figures once it is cut to `shape`."""
    rows = [_row(segment, shape) for segment in rollout.segments]
    trained = sum(sum(mask) for _, _, mask, _ in rows)
    cut = rollout.trained_tokens - trained
    # The last row stands for the rollout in its group: one without a trained token would stand for nothing.
    kept = [at for at, row in enumerate(rows) if any(row[2])] or [len(rows) - 1]
    outputs = [_output(rollout, rollout.segments[at], rows[at]) for at in kept]
    outputs[-1].reward_score = rollout.reward
    dropped = Counter(rollout.dropped) + Counter({DropReason.OVER_LENGTH: cut})
    figures = replace(Figures.of(rollout), tokens_trained=trained, dropped=dict(dropped), segments=len(outputs))
    figures.check_conservation()
    return outputs, figures


def masked_output(rollout: Rollout, shape: Shape, reward: float) -> AgentLoopOutput:
    """A row for a failed rollout that trains nothing: one masked token after the first prompt."""
    end = TokenIds((shape.end,))
    prompt = rollout.turns[0].prompt_ids if rollout.turns else end
    row = _row(Segment(prompt, end, Mask((0,)), Logprobs((0.0,))), shape)
    output = _output(rollout, None, row)
    output.reward_score = reward
    return output


Row = tuple[list[int], list[int], list[int], list[float]]
"""Prompt ids, response ids, response mask and response logprobs."""


def _row(segment: Segment, shape: Shape) -> Row:
    prompt = segment.prompt_ids
    ids, mask, logprobs = segment.response_ids, segment.response_mask, segment.response_logprobs
    if shape.padded and len(prompt) > shape.prompt_length:
        # The sequence stays what it is: what the prompt has too much stands, masked, before the response.
        prompt, rest = prompt[: shape.prompt_length], prompt[shape.prompt_length :]
        ids = rest + ids
        mask, logprobs = Mask.filled(0, len(rest)) + mask, Logprobs.filled(0.0, len(rest)) + logprobs
    if not ids:
        ids, mask, logprobs = TokenIds((shape.end,)), Mask((0,)), Logprobs((0.0,))
    end = _end_of_training(mask[: shape.response_length])
    return list(prompt), list(ids[:end]), list(mask[:end]), list(logprobs[:end])


def _end_of_training(mask: Sequence[int]) -> int:
    """verl puts the reward on the last token, and GAE leaves out what stands on a masked one."""
    return max((at + 1 for at, trained in enumerate(mask) if trained), default=1)


def _output(rollout: Rollout, segment: Segment | None, row: Row) -> AgentLoopOutput:
    prompt, ids, mask, logprobs = row
    turns = [rollout.turns[at] for at in segment.turns] if segment else []
    return AgentLoopOutput(
        prompt_ids=prompt,
        response_ids=ids,
        response_mask=mask,
        response_logprobs=logprobs,
        routed_experts=_routed_experts(turns, len(prompt) + len(ids)),
        num_turns=2 * len(turns),
        metrics=AgentLoopMetrics(
            generate_sequences=rollout.seconds_in_model,
            tool_calls=max(0.0, rollout.seconds - rollout.seconds_in_model),
        ),
        extra_fields={
            **_versions(turns or rollout.turns),
            "turn_scores": [],
            "tool_rewards": [],
            # No key of these may be "reward" or "acc", to which verl gives a meaning of its own.
            "reward_extra_info": {
                "gym_turns": len(rollout.turns),
                "gym_truncated": int(rollout.status is RolloutStatus.TRUNCATED),
                "gym_failed": int(rollout.status is RolloutStatus.FAILED),
            },
        },
    )


def _versions(turns: Sequence[Turn]) -> dict[str, int]:
    """The oldest and the newest weights that sampled, as verl's own client tells them: global steps."""
    newest = [turn.weight_version for turn in turns]
    oldest = [
        turn.weight_version if turn.oldest_weight_version is None else turn.oldest_weight_version for turn in turns
    ]
    return {"min_global_steps": min(oldest, default=0), "max_global_steps": max(newest, default=0)}


def _routed_experts(turns: Sequence[Turn], tokens: int) -> Any:
    """Those of the last turn: its prompt and completion are the whole sequence, which may have been cut since."""
    routed = turns[-1].routed_experts if turns else None
    return None if routed is None else routed[:tokens]
