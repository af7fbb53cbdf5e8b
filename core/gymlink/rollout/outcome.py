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

from gymlink.align import RolloutRecord, build_segments
from gymlink.config import AlignmentSettings
from gymlink.gateway import OpenRollout
from gymlink.rollout.claims import NOTHING, Claimed, Claims
from gymlink.rollout.response import Item, answers_from_the_end, carried_ids, output_items
from gymlink.types import DropReason, FailureKind, RolloutStatus, Segment, Turn


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
        dropped={DropReason.FAILED: rollout.sampled_tokens} if rollout.sampled_tokens else {},
    )


def scored(
    rollout: OpenRollout,
    answer: Mapping[str, Any],
    alignment: AlignmentSettings,
    *,
    claims: Claims | None = None,
    strangers: int = 0,
) -> Outcome:
    """An attempt that Gym answered; it can still turn out as failed, when the answer holds no usable score.

    Args:
        rollout: what its calls sampled.
        answer: Gym's, to `/run`.
        alignment: what is trained of a rewritten history.
        claims: finds the turns of a rollout whose calls all came without its id; None where no ids travel through Gym.
        strangers: calls of the policy that came without a rollout's id meanwhile, whosever they are.
    """
    if why := _unusable(answer):
        return failed(rollout, *why)
    items = output_items(answer)
    if turns := rollout.record.turns:
        return _trained(rollout, answer, alignment, turns, _final_turn(rollout.record, items))
    if rollout.overflowed:
        return failed(rollout, FailureKind.CONTEXT_OVERFLOW, "The first prompt already exceeds the policy's context.")
    claimed = claims.take(rollout, items) if claims is not None else NOTHING
    if claimed.unknown:
        return failed(rollout, FailureKind.ALIGNMENT, _why_not_claimed(claimed))
    if not claimed.turns:
        return failed(rollout, FailureKind.NO_MODEL_CALL, _why_no_call(strangers, ids_travel=claims is not None))
    return _trained(rollout, answer, alignment, claimed.turns, len(claimed.turns) - 1)


def _trained(
    rollout: OpenRollout, answer: Mapping[str, Any], alignment: AlignmentSettings, turns: Sequence[Turn], final: int
) -> Outcome:
    segments, dropped = build_segments(turns, on_history_rewrite=alignment.on_history_rewrite, last_turn=final)
    cut = turns[final].finish_reason == "length" or rollout.overflowed
    return Outcome(
        status=RolloutStatus.TRUNCATED if cut or _says_truncated(answer) else RolloutStatus.COMPLETED,
        reward=float(answer["reward"]),
        segments=segments,
        turns=tuple(turns),
        sampled_tokens=rollout.sampled_tokens,
        seconds_in_model=rollout.seconds_in_model,
        dropped=dict(Counter(dropped) + rollout.undelivered),
        response=answer,
    )


def _why_no_call(strangers: int, *, ids_travel: bool) -> str:
    if not strangers:
        return "The agent answered without calling the policy: nothing to train."
    told = f"No call of the policy named this rollout; {strangers} came without an id while it ran"
    passed_on = "or have the agent pass on responses_create_params.metadata"
    if not ids_travel:
        return f"{told}. Set gateway.token_ids: messages, {passed_on}."
    return (
        f"{told}, and Gym told no token ids. Set return_token_id_information: true for the "
        f"policy_model of your configuration, {passed_on}."
    )


def _why_not_claimed(claimed: Claimed) -> str:
    return (
        f"No call of the policy named this rollout. Of the {len(claimed.turns) + claimed.unknown} whose token ids Gym "
        f"told, {claimed.unknown} are not known to this process: sampled elsewhere (with several processes, an agent "
        "has to pass on responses_create_params.metadata), another rollout's, or too long ago."
    )


def _unusable(answer: Mapping[str, Any]) -> tuple[str, str] | None:
    """Kind and detail of what makes Gym's answer no score. The marks of failure are those of Gym 0.7."""
    kind = answer.get("failure_kind")
    if kind or answer.get("mask_sample"):
        return f"gym_{kind or 'masked'}", str(answer.get("failure_reason") or "Gym marked the sample as not to train.")
    reward = answer.get("reward")
    if not isinstance(reward, int | float) or isinstance(reward, bool) or not math.isfinite(reward):
        return FailureKind.ANSWER, f"Gym's answer has the reward {reward!r}; a finite number is needed."
    return None


def _final_turn(record: RolloutRecord, items: Sequence[Item]) -> int:
    """Index of the turn that the final response came from.

    It is known by its ids where they travel through Gym, else by what it says. An agent may give a response that the
    policy never said: then the latest turn is the final one.
    """
    turns = record.turns
    for carried in reversed([*carried_ids(items)]):
        for index in range(len(turns) - 1, -1, -1):
            if turns[index].has_ids_of(carried):
                return index
    said = (record.turn_of(answer) for answer in answers_from_the_end(items))
    return next((index for index in said if index is not None), len(turns) - 1)


def _says_truncated(answer: Mapping[str, Any]) -> bool:
    response = answer.get("response")
    incomplete = isinstance(response, Mapping) and response.get("incomplete_details")
    return bool(incomplete or answer.get("truncated"))
