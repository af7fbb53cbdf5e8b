"""Each trainer mode of verl, run for real in a real Gym: what reached the loss is what was sampled, and no more.

Every step has groups of which all rollouts were scored, groups of which some failed, and groups with rewritten
histories. What the loss was given is compared with rollouts.jsonl, in which the plugin records what was collected.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from gym_rows import MIXED
from gymlink.rollout import recorded_segments
from verl_runs import GENERATIONS, STEPS, Key, Run

pytestmark = [pytest.mark.slow, pytest.mark.gym]

ROLLOUTS = STEPS * 4 * GENERATIONS
PAUSE_S = 2.0
SAME = 1e-4
"""Difference of two probabilities that are the same, computed by two programs."""


@dataclass(frozen=True)
class Mode:
    overrides: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    legacy: bool = False
    on_policy: bool = True
    critic: bool = False
    response_length: int = 128


MODES = {
    "sync": Mode(("trainer.test_freq=2",)),
    "colocate_async": Mode(("trainer.v1.trainer_mode=colocate_async",), on_policy=False),
    "separate_async": Mode(("trainer.v1.trainer_mode=separate_async",), on_policy=False),
    "legacy": Mode(("trainer.use_v1=false", "trainer.test_freq=2"), legacy=True),
    # Linear rollouts of four turns are cut where they have the user's words.
    "critic": Mode(
        ("algorithm.adv_estimator=gae",), {"VERL_ON_CPU_ROUTED_EXPERTS": "1"}, critic=True, response_length=60
    ),
}


def in_modes(chosen: Callable[[Mode], bool]) -> pytest.MarkDecorator:
    """For a test that holds in some modes only."""
    names = [name for name, mode in MODES.items() if chosen(mode)]
    return pytest.mark.parametrize("trained", names, indirect=True, scope="module")


@dataclass(frozen=True)
class Trained:
    mode: Mode
    run: Run

    @property
    def collected(self) -> list[dict[str, Any]]:
        """The rollouts of the groups that were trained. An asynchronous trainer has begun others too."""
        groups = {row.group for row in self.run.rows}
        return [rollout for rollout in self.run.rollouts if rollout["group"] in groups]

    def rollout_of(self) -> dict[Key, dict[str, Any]]:
        """The rollout that each trained row is part of, by the row's key."""
        return {key: rollout for rollout in self.collected for key in keys_of(rollout, self.mode.response_length)}


def keys_of(rollout: dict[str, Any], response_length: int) -> list[Key]:
    """What must reach the loss of a rollout: its segments, cut to verl's length, up to the last trained token."""
    keys = []
    for segment in recorded_segments(rollout):
        mask = segment.response_mask[:response_length]
        length = max((at + 1 for at, trained in enumerate(mask) if trained), default=0)
        response = (segment.response_ids, segment.response_mask, segment.response_logprobs)
        keys.append((tuple(segment.prompt_ids), *(tuple(one[:length]) for one in response)))
    return keys


@pytest.fixture(scope="module", params=MODES)
def trained(request: pytest.FixtureRequest, run_verl: Any) -> Trained:
    mode = MODES[request.param]
    # Slow agents, where the trainer does not wait for all: the weights change while rollouts are under way.
    rows = MIXED if mode.on_policy else [{**row, "pause_s": PAUSE_S} for row in MIXED]
    run = run_verl(*mode.overrides, f"data.max_response_length={mode.response_length}", rows=rows, env=mode.env)
    assert run.status == 0, run.said[-5000:]
    return Trained(mode, run)


def test_it_ends_and_leaves_nothing_behind(trained: Trained) -> None:
    assert trained.run.error is None
    assert trained.run.left == ()
    assert trained.run.rows[-1].step == STEPS
    agents = Counter(rollout["agent"] for rollout in trained.collected)
    assert agents.total() == ROLLOUTS
    if trained.mode.on_policy:
        assert agents == {"forgetful_agent": ROLLOUTS // 2, "flaky_agent": ROLLOUTS // 2}


def test_every_sampled_token_is_trained_once(trained: Trained) -> None:
    rollouts = trained.collected
    scored = [rollout for rollout in rollouts if rollout["reward"] is not None]
    failed = [rollout for rollout in rollouts if rollout["status"] == "failed"]
    assert len(scored) + len(failed) == len(rollouts)
    assert failed
    expected = Counter(key for rollout in scored for key in keys_of(rollout, trained.mode.response_length))
    assert set(expected.values()) == {1}
    assert Counter(row.key for row in trained.run.rows if row.is_trained) == expected

    rewritten = [rollout for rollout in scored if rollout["prefix_breaks"]]
    assert rewritten
    assert {len(rollout["segments"]) for rollout in rewritten} == {1 if trained.mode.legacy else 2}
    assert {len(rollout["segments"]) for rollout in scored if not rollout["prefix_breaks"]} == {1}
    for rollout in rollouts:
        dropped = rollout["tokens_dropped"]
        assert rollout["tokens_sampled"] == rollout["tokens_trained"] + sum(dropped.values())
        for reason in dropped:
            assert {
                "failed": rollout["status"] == "failed",
                "other_branch": trained.mode.legacy and rollout["prefix_breaks"],
                "over_length": trained.mode.critic,
            }[reason]


def test_a_failed_rollout_trains_nothing(trained: Trained) -> None:
    failed = Counter(rollout["group"] for rollout in trained.collected if rollout["status"] == "failed")
    masked = Counter(row.group for row in trained.run.rows if not row.is_trained)
    if trained.mode.legacy:
        assert masked == failed
    else:
        assert not masked.keys() & {rollout["group"] for rollout in trained.collected}, "verl's padding has its own uid"


def test_the_policy_that_sampled_is_the_policy_that_is_trained(trained: Trained) -> None:
    compared = 0
    for row in filter(lambda row: row.is_trained, trained.run.rows):
        if row.versions != (row.step - 1, row.step - 1):
            assert not trained.mode.on_policy, "sampled with the weights of the step before"
            continue
        compared += 1
        difference = (row.rollout_log_probs.exp() - row.old_log_probs.exp())[row.mask].abs().max()
        assert difference <= SAME
    assert compared


def test_versions_are_those_that_the_servers_told(trained: Trained) -> None:
    rollout_of = trained.rollout_of()
    for row in filter(lambda row: row.is_trained, trained.run.rows):
        oldest, newest = row.versions
        told = rollout_of[row.key]["weight_versions"]
        assert 0 <= oldest <= newest < row.step
        assert newest in told
        assert oldest <= min(told) if len(rollout_of[row.key]["segments"]) == 1 else oldest <= max(told)


@in_modes(lambda mode: not mode.critic)
def test_advantages_are_those_of_the_scored_rollouts(trained: Trained) -> None:
    by_group: dict[str, list[float | None]] = defaultdict(list)
    for rollout in trained.collected:
        by_group[rollout["group"]].append(rollout["reward"])
    assert {len(rewards) for rewards in by_group.values()} == {GENERATIONS}
    assert any(None in rewards for rewards in by_group.values())
    rollout_of = trained.rollout_of()
    for row in filter(lambda row: row.is_trained, trained.run.rows):
        advantage = advantage_of(rollout_of[row.key]["reward"], by_group[row.group], trained.mode.legacy)
        expected = torch.full(row.mask.shape, advantage) * row.mask
        torch.testing.assert_close(row.advantages, expected, atol=2e-4, rtol=1e-4)


def advantage_of(reward: float, group: list[float | None], legacy: bool) -> float:
    """GRPO's, over the rollouts of a group that were scored, however many rows each has.

    `gymlink.rollout.neutral` says what differs there: beside a single failed rollout the spread is that of all rows.
    """
    scored = [one for one in group if one is not None]
    assert len(scored) > 1
    spread = stdev(scored)
    if legacy and len(scored) == len(group) - 1:
        spread *= math.sqrt((len(group) - 2) / (len(group) - 1))
    return (reward - fmean(scored)) / (spread + 1e-6)


@in_modes(lambda mode: mode.critic)
def test_a_critic_learns_the_reward_at_every_token(trained: Trained) -> None:
    """With verl's defaults, gamma and lambda of 1, the return of a token is the reward of its rollout."""
    rollout_of = trained.rollout_of()
    rows = [row for row in trained.run.rows if row.is_trained]
    assert Counter(row.key for row in trained.run.critic_rows if row.is_trained) == Counter(row.key for row in rows)
    for row in [*rows, *(row for row in trained.run.critic_rows if row.is_trained)]:
        returns = row.returns[row.mask]
        torch.testing.assert_close(returns, torch.full_like(returns, rollout_of[row.key]["reward"]), atol=1e-5, rtol=0)
    for step in range(1, STEPS + 1):
        of_step = [row for row in rows if row.step == step]
        better = torch.cat([(row.returns - row.values)[row.mask] for row in of_step])
        advantages = torch.cat([row.advantages[row.mask] for row in of_step])
        torch.testing.assert_close(advantages, (better - better.mean()) / better.std(), atol=1e-4, rtol=1e-4)


def test_the_log_accounts_for_every_token(trained: Trained) -> None:
    logged = [figures for figures in trained.run.logged if "training/global_step" in figures]
    assert [figures["training/global_step"] for figures in logged] == [*range(1, STEPS + 1)]
    if trained.mode.legacy:
        return  # it has no place for figures of the rollouts; rollouts.jsonl has them
    for figures in logged:
        assert (
            figures["rollout/tokens_sampled"] == figures["rollout/tokens_trained"] + figures["rollout/tokens_dropped"]
        )

    def total(name: str) -> float:
        return sum(figures[f"rollout/{name}"] for figures in logged)

    failed = sum(rollout["status"] == "failed" for rollout in trained.collected)
    tokens = sum(int(row.mask.sum()) for row in trained.run.rows)
    if trained.mode.on_policy:
        assert (total("count"), total("failed"), total("tokens_trained")) == (ROLLOUTS, failed, tokens)
    else:  # rollouts for later steps have ended too
        assert total("count") >= ROLLOUTS
        assert total("failed") >= failed
        assert total("tokens_trained") >= tokens
    cut = sum(figures.get("rollout/tokens_dropped/over_length", 0) for figures in logged)
    assert (cut > 0) == trained.mode.critic


@in_modes(lambda mode: "trainer.test_freq=2" in mode.overrides)
def test_validation_is_told_for_each_environment(trained: Trained) -> None:
    exams = [rollout for rollout in trained.run.rollouts if rollout["input"][0]["content"].startswith("exam")]
    validated = [figures for figures in trained.run.logged if any(name.startswith("val-core/") for name in figures)]
    assert len(validated) == 2
    assert len(exams) == 8
    for at, figures in enumerate(validated):
        of_this = exams[4 * at : 4 * at + 4]
        for agent in ("flaky_agent", "forgetful_agent"):
            rewards = [rollout["reward"] for rollout in of_this if rollout["agent"] == agent]
            scored = [reward for reward in rewards if reward is not None]
            assert len(scored) == (1 if agent == "flaky_agent" else 2)
            assert figures[f"val-core/{agent}/reward/mean@1"] == pytest.approx(fmean(scored), abs=1e-5)


def test_routed_experts_are_those_of_the_last_turn(trained: Trained) -> None:
    """The server tells them for all that it was fed: the whole row but its last token, which verl fills up with 0."""
    if "VERL_ON_CPU_ROUTED_EXPERTS" not in trained.mode.env:
        assert {row.routed_experts is None for row in trained.run.rows} == {True}
        return
    from verl_on_cpu.server import routed_experts

    for row in filter(lambda row: row.is_trained, trained.run.rows):
        told = torch.from_numpy(routed_experts([*row.prompt, *row.response]))
        assert row.routed_experts is not None
        assert row.routed_experts.shape == told.shape
        assert (row.routed_experts[:-1] == told[:-1]).all()


@in_modes(lambda mode: not mode.on_policy)
def test_some_rollouts_go_on_with_new_weights(trained: Trained) -> None:
    """A rollout that is under way when the weights change is continued with the new ones, and the row says so."""
    spread = {newest - oldest for oldest, newest in (row.versions for row in trained.run.rows if row.is_trained)}
    assert max(spread) >= 1
