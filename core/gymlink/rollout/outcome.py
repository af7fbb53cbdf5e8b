"""What became of one attempt at a rollout: Gym's answer and the gateway's record, brought together.

The record decides what was sampled; Gym decides the reward. Sampled tokens are conserved: each is trained in one
segment or counted under the reason why not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gymlink.align import build_segments
from gymlink.config import AlignmentSettings
from gymlink.gateway import OpenRollout
from gymlink.types import RolloutStatus, Segment, Turn

FAILED = "failed"
"""The reason under which the sampled tokens of a failed rollout's last attempt are counted."""
FAILED_ATTEMPT = "failed_attempt"
"""The reason for those of the attempts before the last."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One attempt. `failure` is None exactly when `status` is not FAILED."""

    status: RolloutStatus
    reward: float | None = None
    segments: tuple[Segment, ...] = ()
    turns: tuple[Turn, ...] = ()
    failure: str | None = None
    detail: str | None = None
    sampled_tokens: int = 0
    seconds_in_model: float = 0.0
    dropped: Mapping[str, int] = field(default_factory=dict)
    response: Mapping[str, Any] | None = None


def failed(rollout: OpenRollout, kind: str, detail: str) -> Outcome:
    """An attempt without a usable score. All that it sampled is dropped, and counted."""
    return Outcome(
        status=RolloutStatus.FAILED,
        failure=kind,
        detail=detail,
        turns=rollout.record.turns,
        sampled_tokens=rollout.sampled_tokens,
        seconds_in_model=rollout.seconds_in_model,
        dropped={FAILED: rollout.sampled_tokens} if rollout.sampled_tokens else {},
    )


def scored(rollout: OpenRollout, answer: Mapping[str, Any], alignment: AlignmentSettings) -> Outcome:
    """An attempt that Gym answered; it can still turn out as failed, when the answer holds no usable score."""
    if why := _unusable(answer):
        return failed(rollout, *why)
    turns = rollout.record.turns
    if not turns:
        if rollout.overflowed:
            return failed(rollout, "context_overflow", "The first prompt already exceeds the policy's context.")
        return failed(rollout, "no_model_call", "The agent answered without calling the policy: nothing to train.")
    final = _final_turn(turns, _output_items(answer))
    segments, dropped = build_segments(turns, on_history_rewrite=alignment.on_history_rewrite, last_turn=final)
    cut = turns[final].finish_reason == "length" or rollout.overflowed
    return Outcome(
        status=RolloutStatus.TRUNCATED if cut or _says_truncated(answer) else RolloutStatus.COMPLETED,
        reward=float(answer["reward"]),
        segments=segments,
        turns=turns,
        sampled_tokens=rollout.sampled_tokens,
        seconds_in_model=rollout.seconds_in_model,
        dropped=dict(Counter(dropped) + rollout.undelivered),
        response=answer,
    )


def _unusable(answer: Mapping[str, Any]) -> tuple[str, str] | None:
    """Kind and detail of what makes Gym's answer no score. The marks of failure are those of Gym 0.7."""
    kind = answer.get("failure_kind")
    if kind or answer.get("mask_sample"):
        return f"gym_{kind or 'masked'}", str(answer.get("failure_reason") or "Gym marked the sample as not to train.")
    reward = answer.get("reward")
    if not isinstance(reward, int | float) or isinstance(reward, bool) or not math.isfinite(reward):
        return "answer", f"Gym's answer has the reward {reward!r}; a finite number is needed."
    return None


def _output_items(answer: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    response = answer.get("response")
    output = response.get("output") if isinstance(response, Mapping) else None
    return [item for item in output if isinstance(item, Mapping)] if isinstance(output, list) else []


def _final_turn(turns: Sequence[Turn], output: Sequence[Mapping[str, Any]]) -> int:
    """Index of the turn that the final response came from.

    Gym puts each call's ids on the last output item of that call. Where none is there (an agent that drops them),
    the latest turn is the final one.
    """
    ids = next((item["generation_token_ids"] for item in reversed(output) if item.get("generation_token_ids")), None)
    if isinstance(ids, list):
        for index in range(len(turns) - 1, -1, -1):
            if list(turns[index].completion_ids) == ids:
                return index
    return len(turns) - 1


def _says_truncated(answer: Mapping[str, Any]) -> bool:
    response = answer.get("response")
    incomplete = isinstance(response, Mapping) and response.get("incomplete_details")
    return bool(incomplete or answer.get("truncated"))
