"""The recorded rollouts through the OpenRLHF plugin and OpenRLHF's own steps from an agent's response to advantages.

The plugin is given the rollouts where its actor's worker would collect them. OpenRLHF's rollout actor runs the agent,
its trainer reads the responses, puts them into micro batches, makes advantages of them with group_norm, and takes them
apart again for its replay buffer. Nothing of that needs Ray or a model.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openrlhf.trainer.ppo_utils.experience import Experience, remove_padding_in_sequences, split_experience_batch

from expected_rows import QUANTITIES, Row, assert_same, expected_rows
from gymlink.types import Rollout
from openrlhf_actor import Actor, Worker
from openrlhf_steps import arguments, with_advantages
from recorded_rollouts import (
    FORKED,
    SIBLINGS,
    UNCOMPARABLE,
    RecordedWorker,
    read_rollouts,
    recorded_tokenizer,
    row_of,
)

EPSILON = 1e-9
"""What OpenRLHF adds to the standard deviation."""
CONTEXT = 100
"""No recorded rollout is longer: OpenRLHF limits prompt and response together, and the engine sees to it."""
FLAGS = ("--algo.advantage.estimator", "group_norm", "--rollout.n_samples_per_prompt", str(SIBLINGS))

GROUPS = {name: siblings for name, siblings in read_rollouts().items() if name != FORKED}
"""OpenRLHF takes one sample for a rollout, so the plugin asks for the final branch alone."""
COMPARED = [name for name in GROUPS if name not in UNCOMPARABLE]
PLACEHOLDER = 1
"""Tokens to train that a sample has which stands for a rollout without any."""


class Recorded(RecordedWorker, Worker):
    """What the executor calls of a worker, with the recorded rollouts."""

    def __init__(self) -> None:
        Worker.__init__(self)
        RecordedWorker.__init__(self, GROUPS)


class Batch:
    """A batch as OpenRLHF has it in its replay buffer: one sample for each rollout."""

    def __init__(self, folder: Path, groups: Sequence[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            self.actor = Actor(folder, FLAGS, recorded_tokenizer(), Recorded(), patch)
            responses = asyncio.run(self._respond(groups))
        told = [one for siblings in responses for one in siblings]
        batch = with_advantages(told, arguments("group_norm", SIBLINGS), max_length=CONTEXT)
        samples = [one for each in batch for one in remove_padding_in_sequences(split_experience_batch(each))]
        self._samples = {name: samples[at * SIBLINGS : (at + 1) * SIBLINGS] for at, name in enumerate(groups)}

    async def _respond(self, groups: Sequence[str]) -> list[list[dict[str, Any]]]:
        self.actor.start()
        labels = [json.dumps(row_of(name)) for name in groups]
        return await asyncio.gather(*(self.actor.respond(label, SIBLINGS, max_length=CONTEXT) for label in labels))

    def rows(self, group: str) -> dict[int, Row]:
        """By the number of the sibling."""
        return {at: _row(sample, GROUPS[group][at]) for at, sample in enumerate(self._samples[group])}

    def trained(self, group: str) -> dict[int, list[Row]]:
        """Of the rollouts that count."""
        return {at: [row] for at, row in self.rows(group).items() if counts(GROUPS[group][at])}


def _row(sample: Experience, rollout: Rollout) -> Row:
    """OpenRLHF knows no prompt: all but the ids begin at the second token, which the first one predicts."""
    ids = sample.sequences.tolist()
    start = len(rollout.segments[-1].prompt_ids) if counts(rollout) else len(ids) - PLACEHOLDER
    mask = [0, *sample.action_mask.tolist()]
    advantages = [0.0, *(sample.advantages * sample.action_mask).tolist()]
    return Row(
        prompt_ids=tuple(ids[:start]),
        response_ids=tuple(ids[start:]),
        mask=tuple(mask[start : len(ids)]),
        logprobs=tuple([0.0, *sample.rollout_log_probs.tolist()][start : len(ids)]),
        reward=float(sample.rewards),
        advantages=tuple(advantages[start : len(ids)]),
    )


def counts(rollout: Rollout) -> bool:
    """A rollout that was scored and in which nothing was sampled has no part in OpenRLHF's baseline: a sample must have
    a token to train, and it has none.
    """
    return rollout.reward is not None and rollout.trained_tokens > 0


def expected_of(group: str) -> list[list[Row]]:
    """The rows that end with the last trained token; with one failure, the others' advantages are larger by the factor
    that `gymlink.rollout.neutral` tells.
    """
    siblings = [one if counts(one) else replace(one, reward=None) for one in GROUPS[group]]
    failed = sum(one.reward is None for one in siblings)
    factor = math.sqrt((SIBLINGS - 1) / (SIBLINGS - 2)) if failed == 1 else 1.0
    expected = expected_rows(siblings, limit=CONTEXT, end=-1, epsilon=EPSILON)
    return [[_grown(row.without_masked_tail, factor) for row in rows] for rows in expected]


def _grown(row: Row, factor: float) -> Row:
    return replace(row, advantages=tuple(factor * one for one in row.advantages))


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    return Batch(tmp_path_factory.mktemp("openrlhf"), list(GROUPS))


@pytest.mark.parametrize("group", COMPARED)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_what_openrlhf_trains_is_what_is_expected(batch: Batch, group: str, quantity: str) -> None:
    assert_same(quantity, group, expected_of(group), batch.trained(group), "OpenRLHF")


@pytest.mark.parametrize("group", COMPARED)
def test_a_failed_rollout_moves_nothing(batch: Batch, group: str) -> None:
    """What stands for it is one token that the policy sampled; two with which the spread is kept cancel."""
    others = [row for at, row in batch.rows(group).items() if not counts(GROUPS[group][at])]
    for row in others:
        assert row.mask == (1,)
        assert (*row.prompt_ids, *row.response_ids) in sampled(group)
    advantages = [row.advantages[0] for row in others]
    assert sum(advantages) == pytest.approx(0, abs=1e-6)
    assert len({(row.prompt_ids, row.response_ids, row.logprobs) for row in others}) <= 1
    if len(advantages) == 1:
        assert advantages == pytest.approx([0], abs=1e-6)


@pytest.mark.parametrize("group", UNCOMPARABLE)
def test_nothing_is_trained_where_nothing_can_be_compared(batch: Batch, group: str) -> None:
    for row in batch.rows(group).values():
        assert (row.mask, row.advantages) == ((1,), (0.0,))
        assert (*row.prompt_ids, *row.response_ids) in sampled(group)


def sampled(group: str) -> set[tuple[int, ...]]:
    """Each prompt in this group with the first token that was sampled after it."""
    turns = [turn for rollout in GROUPS[group] for turn in rollout.turns]
    return {(*turn.prompt_ids, turn.completion_ids[0]) for turn in turns if turn.completion_ids}


def test_what_is_trained_and_what_is_not_add_up_to_what_was_sampled(batch: Batch) -> None:
    told = [figures for _, figures in batch.actor.job.told]
    for figures in told:
        figures.check_conservation()
    sampled = sum(one.sampled_tokens for siblings in GROUPS.values() for one in siblings)
    assert sum(figures.tokens_sampled for figures in told) == sampled
    trained = sum(sum(row.mask) for group in COMPARED for [row] in batch.trained(group).values())
    assert sum(figures.tokens_trained for figures in told) == trained


@pytest.mark.parametrize("groups", [["all_failed", "plain"], ["plain", "all_failed"]], ids=" then ".join)
def test_a_group_that_failed_is_neutral_wherever_it_stands(tmp_path: Path, groups: Sequence[str]) -> None:
    rows = Batch(tmp_path, groups).rows("all_failed")
    assert {row.advantages for row in rows.values()} == {(0.0,)}
    assert len({row.reward for row in rows.values()}) == 1
