"""OpenRLHF's trainers, run for real with real vLLM in a real Gym: what reached the loss is what was sampled.

The rows give groups of which all rollouts were scored, groups of which some failed (every fifth of that agent), and
groups with rewritten histories. What the loss was given is compared with rollouts.jsonl, in which the plugin records
what was collected.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from gym_rows import MIXED, Row, flaky, forgetful
from gymlink.rollout import recorded_segments
from openrlhf_runs import GENERATIONS, PROMPTS, Run

pytestmark = [pytest.mark.slow, pytest.mark.gym]

PAUSE_S = 6.0
"""Before each turn but the first: rollouts have to last longer than a training step, also on a busy machine."""
STEPS = 3
FILTER = ("--algo.dynamic_filtering_range", "0.001", "9")
BFLOAT16 = 5e-3
TURN = 6
"""Tokens that a turn may have."""
SAME = 2e-3
"""The mean difference of log probabilities over a turn of the same weights, in bfloat16."""
"""Difference of two probabilities that are the same, computed in bfloat16 by two programs."""
KL = 2e-3
"""The bound for the mean difference of log probabilities over a batch."""

Key = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...] | None]
"""What tells a row: its ids, their mask, and the logprobs that they were sampled with."""


@dataclass(frozen=True)
class Mode:
    flags: tuple[str, ...]
    rows: Sequence[Row]
    estimator: str
    corrected: bool = True
    """Whether OpenRLHF takes the sampled logprobs (importance sampling correction)."""
    evaluates: bool = False
    on_policy: bool = True


MODES = {
    "sync": Mode(
        ("--algo.advantage.estimator=group_norm", "--algo.advantage.is_correction_level=token", "--eval.steps=2"),
        MIXED[: STEPS * PROMPTS],
        "group_norm",
        evaluates=True,
    ),
    # Slow agents: the weights change while rollouts are under way.
    "async with partial rollout": Mode(
        (
            "--train.async_enable",
            "--train.partial_rollout_enable",
            "--vllm.num_engines=2",
            "--algo.advantage.estimator=group_norm",
            "--algo.advantage.is_correction_level=seq",
        ),
        [{**row, "pause_s": PAUSE_S} for row in MIXED[: STEPS * PROMPTS]],
        "group_norm",
        on_policy=False,
    ),
    "every fifth fails": Mode(
        (
            "--algo.advantage.estimator=rloo",
            "--algo.dynamic_filtering_enable",
            *FILTER,
        ),
        [
            *[row for number in range(8) for row in (flaky(number, 5), forgetful(number, 2))][: STEPS * PROMPTS],
            # What OpenRLHF filters out and replaces: a prompt that always fails, and one with rewards out of range.
            flaky(0, 1, name="hopeless"),
            forgetful(200, 0, name="rich"),
        ],
        "rloo",
        corrected=False,
    ),
}


@dataclass(frozen=True)
class Trained:
    mode: Mode
    run: Run

    @property
    def collected(self) -> list[dict[str, Any]]:
        """The rollouts of the groups that are trained."""
        return [rollout for rollout in self._for_training if not is_filtered(rollout)]

    @property
    def filtered(self) -> list[dict[str, Any]]:
        return [rollout for rollout in self._for_training if is_filtered(rollout)]

    @property
    def _for_training(self) -> list[dict[str, Any]]:
        return [rollout for rollout in self.run.rollouts if rollout["split"] == "train"]

    def key(self, rollout: dict[str, Any]) -> Key:
        """What must reach the loss of a rollout: its segment, up to the last token to train."""
        [segment] = recorded_segments(rollout)
        mask = segment.response_mask
        length = max(at + 1 for at, trained in enumerate(mask) if trained)
        before = len(segment.prompt_ids)
        ids = (*segment.prompt_ids, *segment.response_ids[:length])
        logprobs = (*[0.0] * before, *segment.response_logprobs[:length]) if self.mode.corrected else None
        return ids, (*[0] * before, *mask[:length]), logprobs and tuple(map(single, logprobs))

    def rollout_of(self) -> dict[Key, dict[str, Any]]:
        return {self.key(rollout): rollout for rollout in self.collected if rollout["tokens_trained"]}


def is_filtered(rollout: dict[str, Any]) -> bool:
    return str(rollout["input"][0]["content"]).startswith(("hopeless", "rich"))


def single(number: float) -> float:
    """As float32 has it."""
    return float(torch.tensor(number, dtype=torch.float32))


@pytest.fixture(scope="module", params=MODES)
def trained(request: pytest.FixtureRequest, run_openrlhf: Any) -> Trained:
    mode = MODES[request.param]
    run = run_openrlhf(*mode.flags, rows=mode.rows)
    assert run.status == 0, run.said[-5000:]
    return Trained(mode, run)


def test_it_ends_and_leaves_nothing_behind(trained: Trained) -> None:
    assert trained.run.error is None
    assert trained.run.left == ()
    assert {row.step for row in trained.run.rows} == {*range(1, STEPS + 1)}
    assert len(trained.run.rows) == len(trained.collected) == STEPS * PROMPTS * GENERATIONS


def test_every_sampled_token_is_trained_once(trained: Trained) -> None:
    failed = [rollout for rollout in trained.collected if rollout["status"] == "failed"]
    assert failed
    in_loss = Counter(row.key for row in trained.run.rows)
    expected = trained.rollout_of()
    assert all(in_loss[key] == 1 for key in expected)
    placeholders = {key: count for key, count in in_loss.items() if key not in expected}
    assert sum(placeholders.values()) == len(trained.collected) - len(expected)
    assert {sum(mask) for _, mask, _ in placeholders} == {1}, "one token stands for a rollout with nothing to train"
    for rollout in trained.collected:
        dropped = sum(rollout["tokens_dropped"].values())
        assert rollout["tokens_sampled"] == rollout["tokens_trained"] + dropped
        assert dropped == 0 or rollout["status"] == "failed" or rollout["prefix_breaks"]


def test_what_is_filtered_out_is_counted_and_not_trained(trained: Trained) -> None:
    if "--algo.dynamic_filtering_enable" not in trained.mode.flags:
        assert trained.filtered == []
        return
    reasons = Counter(reason for rollout in trained.filtered for reason in rollout["tokens_dropped"])
    assert reasons == {"failed": GENERATIONS, "filtered": GENERATIONS}
    assert {rollout["tokens_trained"] for rollout in trained.filtered} == {0}
    in_loss = {row.ids for row in trained.run.rows}
    for rollout in trained.filtered:
        for segment in recorded_segments(rollout):
            assert (*segment.prompt_ids, *segment.response_ids) not in in_loss


def test_of_a_rewritten_history_the_final_branch_is_trained(trained: Trained) -> None:
    rewritten = [rollout for rollout in trained.collected if rollout["prefix_breaks"]]
    assert rewritten
    for rollout in rewritten:
        assert len(rollout["segments"]) == 1
        assert rollout["tokens_dropped"]["other_branch"] > 0
        assert rollout["tokens_trained"] > 0


def test_advantages_are_those_of_the_scored_rollouts(trained: Trained) -> None:
    by_group: dict[str, list[float | None]] = defaultdict(list)
    for rollout in trained.collected:
        by_group[rollout["group"]].append(rollout["reward"])
    assert {len(rewards) for rewards in by_group.values()} == {GENERATIONS}
    assert any(None in rewards for rewards in by_group.values())
    rollout_of = trained.rollout_of()
    for row in trained.run.rows:
        rollout = rollout_of.get(row.key)
        if rollout is None:
            continue
        expected = advantage_of(rollout["reward"], by_group[rollout["group"]], trained.mode.estimator)
        assert row.advantages[row.mask].tolist() == pytest.approx([expected] * int(row.mask.sum()), abs=2e-4, rel=1e-3)


def advantage_of(reward: float, group: list[float | None], estimator: str) -> float:
    """Over the rollouts of a group that were scored; see `gymlink.rollout.neutral` for a single failure."""
    scored = [one for one in group if one is not None]
    assert len(scored) > 1
    if estimator == "rloo":
        return len(scored) / (len(scored) - 1) * (reward - fmean(scored))
    spread = stdev(scored)
    if len(scored) == len(group) - 1:
        spread *= math.sqrt((len(group) - 2) / (len(group) - 1))
    return (reward - fmean(scored)) / (spread + 1e-9)


def test_what_stands_for_a_failed_rollout_moves_nothing(trained: Trained) -> None:
    """With one failure in a group its advantage is 0; with more they may be not, and then add up to it."""
    rollout_of = trained.rollout_of()
    sums: dict[Key, float] = defaultdict(float)
    for row in trained.run.rows:
        if row.key not in rollout_of:
            sums[row.key] += float(row.advantages[row.mask].sum())
    assert sums
    assert list(sums.values()) == pytest.approx([0.0] * len(sums), abs=1e-4)


def test_the_policy_that_sampled_is_the_policy_that_is_trained(trained: Trained) -> None:
    if not trained.mode.corrected:
        assert {row.rollout_log_probs for row in trained.run.rows} == {None}
        return
    # Without waiting for each other, trainer and engines have the same weights in the first step only.
    rows = [row for row in trained.run.rows if trained.mode.on_policy or row.step == 1]
    sampled = torch.cat([row.rollout_log_probs[row.mask] for row in rows])
    recomputed = torch.cat([row.old_log_probs[row.mask] for row in rows])
    assert abs(float((sampled - recomputed).mean())) <= KL
    assert float((sampled.exp() - recomputed.exp()).abs().max()) <= BFLOAT16


def test_with_partial_rollout_a_rollout_goes_on_with_new_weights(trained: Trained) -> None:
    """Its first turn was sampled with weights that are no more, and its last one with those that are trained."""
    if trained.mode.on_policy:
        return
    differences = [(row.rollout_log_probs - row.old_log_probs)[row.mask].abs() for row in trained.run.rows]
    ends = [(float(one[:TURN].mean()), float(one[-TURN:].mean())) for one in differences if len(one) >= 3 * TURN]
    assert any(last <= SAME and first >= 5 * SAME for first, last in ends), ends


def test_evaluation_is_told_for_each_environment(trained: Trained) -> None:
    exams = [rollout for rollout in trained.run.rollouts if rollout["split"] == "val"]
    if not trained.mode.evaluates:
        assert exams == []
        return
    assert len(exams) == 4 * GENERATIONS
    for agent in ("flaky_agent", "forgetful_agent"):
        groups: dict[str, list[float]] = defaultdict(list)
        for rollout in exams:
            if rollout["agent"] == agent and rollout["reward"] is not None:
                groups[rollout["group"]].append(rollout["reward"])
        told = re.search(rf"'eval_{agent}_pass1': ([\d.]+)", trained.run.said)
        assert told is not None
        assert float(told[1]) == pytest.approx(fmean(fmean(rewards) for rewards in groups.values()), abs=1e-5)


def test_every_engine_serves_rollouts(trained: Trained) -> None:
    owners = {rollout["rollout_id"].partition(".")[0] for rollout in trained.collected}
    assert len(owners) == (2 if "--vllm.num_engines=2" in trained.mode.flags else 1)
