"""What a plugin must hand to its trainer for the recorded rollouts, worked out from their turns in plain Python.

Nothing here is the plugins' or the core's: a sequence is put together from what the policy saw and said, and the
advantage is GRPO's, over the siblings that were scored (https://arxiv.org/abs/2402.03300, section 4.1.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from gymlink.types import Rollout, Turn

QUANTITIES = ("prompt_ids", "response_ids", "mask", "logprobs", "reward", "advantages")


@dataclass(frozen=True)
class Row:
    """One training sequence. All but the prompt and the reward have one value for each token of the response.

    `advantages` are those that enter the loss: 0 where the mask is.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    mask: tuple[int, ...]
    logprobs: tuple[float, ...]
    reward: float | None
    advantages: tuple[float, ...]

    @property
    def without_masked_tail(self) -> Row:
        """Up to the last trained token, or to the first of all. No loss sees what is left out."""
        end = max((at + 1 for at, on in enumerate(self.mask) if on), default=1)
        return Row(
            self.prompt_ids,
            self.response_ids[:end],
            self.mask[:end],
            self.logprobs[:end],
            self.reward,
            self.advantages[:end],
        )


def expected_rows(siblings: Sequence[Rollout], *, limit: int, end: int, epsilon: float) -> list[list[Row]]:
    """The rows of each rollout of a group, none for a failed one; the branch of the final response is the last.

    `limit` is how many tokens a response may have, `end` stands, masked, where it would have none, and `epsilon` is
    what the trainer adds to the standard deviation.
    """
    advantages = expected_advantages([one.reward for one in siblings], epsilon)
    return [
        [] if advantage is None else _rows(rollout, advantage, limit, end)
        for rollout, advantage in zip(siblings, advantages, strict=True)
    ]


def expected_advantages(rewards: Sequence[float | None], epsilon: float) -> list[float | None]:
    """`(reward - mean) / (deviation + epsilon)` over the scored siblings; 0 for one alone, None for a failed one."""
    scored = [reward for reward in rewards if reward is not None]
    if len(scored) < 2:
        return [None if reward is None else 0.0 for reward in rewards]
    mean = sum(scored) / len(scored)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in scored) / (len(scored) - 1))
    return [None if reward is None else (reward - mean) / (deviation + epsilon) for reward in rewards]


def _rows(rollout: Rollout, advantage: float, limit: int, end: int) -> list[Row]:
    assert rollout.reward is not None
    rows = []
    for path, trained in _branches(rollout):
        prompt, ids, mask, logprobs = _sequence([rollout.turns[at] for at in path], [at in trained for at in path])
        ids, mask, logprobs = (ids[:limit], mask[:limit], logprobs[:limit]) if ids else ([end], [0], [0.0])
        made = Row(
            prompt_ids=tuple(prompt),
            response_ids=tuple(ids),
            mask=tuple(mask),
            logprobs=tuple(logprobs),
            reward=rollout.reward,
            advantages=tuple(advantage * on for on in mask),
        )
        rows.append(made)
    return rows


def _branches(rollout: Rollout) -> list[tuple[list[int], set[int]]]:
    """Each branch that is trained: its turns from the first on, and those of them that no other branch trains.

    In all recorded plays the last turn gave the final response. A turn that two branches share is the final one's;
    where only that one was recorded as to be trained, it is the only one.
    """
    turns = rollout.turns
    final = _ancestors(turns, len(turns) - 1)
    if rollout.dropped.get("other_branch"):
        return [(final, set(final))]
    others = [at for at in range(len(turns) - 1) if all(turn.parent != at for turn in turns)]
    branches, taken = [], set(final)
    for leaf in others:
        path = _ancestors(turns, leaf)
        branches.append((path, set(path) - taken))
        taken |= set(path)
    return [*branches, (final, set(final))]


def _ancestors(turns: Sequence[Turn], leaf: int) -> list[int]:
    parent = turns[leaf].parent
    return [leaf] if parent is None else [*_ancestors(turns, parent), leaf]


def _sequence(turns: Sequence[Turn], trained: Sequence[bool]) -> tuple[list[int], list[int], list[int], list[float]]:
    """Prompt, response, mask and logprobs: what the last turn saw and said, less what the first one saw."""
    prompt = list(turns[0].prompt_ids)
    whole = [*turns[-1].prompt_ids, *turns[-1].completion_ids]
    mask, logprobs = [0] * len(whole), [0.0] * len(whole)
    for turn, on in zip(turns, trained, strict=True):
        begin, end = len(turn.prompt_ids), len(turn.prompt_ids) + len(turn.completion_ids)
        assert whole[:begin] == list(turn.prompt_ids)
        assert whole[begin:end] == list(turn.completion_ids)
        mask[begin:end] = [int(on)] * (end - begin)
        logprobs[begin:end] = turn.logprobs
    start = len(prompt)
    return prompt, whole[start:], mask[start:], logprobs[start:]


def assert_same(
    quantity: str, group: str, expected: Sequence[Sequence[Row]], trained: Mapping[int, Sequence[Row]], trainer: str
) -> None:
    """Compare one quantity of all rows of a group. `trained` has the trainer's rows by the sibling's number."""
    differences = []
    for index, rows in enumerate(expected):
        found = trained.get(index, ())
        if len(found) != len(rows):
            differences.append(f"{group}/{index} has {len(rows)} rows to train, {trainer} has {len(found)}")
            continue
        for at, (ours, theirs) in enumerate(zip(rows, found, strict=True)):
            where = f"{quantity} of {group}/{index}, row {at}"
            if difference := _difference(getattr(ours, quantity), getattr(theirs, quantity)):
                differences.append(f"{where}{difference} in {trainer}")
    assert not differences, "\n" + "\n".join(differences)


def _difference(wanted: Any, got: Any) -> str | None:
    """The first difference in words, up to the other's name. Numbers are the same when float32 tells no more."""
    if not isinstance(wanted, tuple):
        return None if wanted == pytest.approx(got, rel=1e-5, abs=1e-6) else f": {wanted} recorded, {got}"
    if len(wanted) != len(got):
        return f": {len(wanted)} tokens recorded, {len(got)}"
    for at, (one, other) in enumerate(zip(wanted, got, strict=True)):
        if one != pytest.approx(other, rel=1e-5, abs=1e-6):
            return f", token {at}: {one} recorded, {other}"
    return None
