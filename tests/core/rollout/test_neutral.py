"""Rewards that move nothing: the groups that wait for them, and when a run is stopped instead."""

from __future__ import annotations

import asyncio

import pytest

from gymlink.errors import RolloutError
from gymlink.rollout import Figures, NeutralRewards, neutral_rewards
from gymlink.rollout.neutral import JUDGED
from gymlink.types import RolloutStatus

SCORED = Figures(RolloutStatus.COMPLETED, reward=1.0)
FAILED = Figures(RolloutStatus.FAILED, failure="http", detail="the door is stuck")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gymlink.rollout.neutral.GRACE_S", 0.02)


async def soon(waiting: asyncio.Task[float]) -> float:
    return await asyncio.wait_for(waiting, 5)


async def turns_of_the_loop() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_failed_rollout_waits_for_its_siblings() -> None:
    neutral = NeutralRewards(0.5)
    for _ in range(4):
        neutral.begun("train")
    await neutral.ended("train", "a", FAILED)
    waiting = asyncio.create_task(neutral.reward("train", "a", 4))
    await neutral.ended("train", "a", SCORED)
    await neutral.ended("train", "a", Figures(RolloutStatus.COMPLETED, reward=0.0))
    await turns_of_the_loop()
    assert not waiting.done()
    await neutral.ended("train", "other", SCORED)
    await turns_of_the_loop()
    assert not waiting.done(), "a rollout of another group is no sibling"
    await neutral.ended("train", "a", FAILED)
    both = [await soon(waiting), await neutral.reward("train", "a", 4)]
    assert sorted(both) == pytest.approx(sorted(neutral_rewards([1.0, 0.0], 2)))


async def test_a_group_that_failed_gets_the_mean_of_the_latest() -> None:
    """In training any reward will do: all rows of the group are masked, and have the same reward."""
    neutral = NeutralRewards(0.5)
    await scored_and_failed(neutral, "train", scored=[0.25, 0.75])
    assert await neutral.reward("train", "bad", 2) == await neutral.reward("train", "bad", 2) == 0.5


async def test_a_group_that_failed_before_anything_was_scored_waits_for_the_first_reward() -> None:
    neutral = NeutralRewards(0.5)
    for _ in range(3):
        neutral.begun("train")
    for _ in range(2):
        await neutral.ended("train", "bad", FAILED)
    waiting = asyncio.create_task(neutral.reward("train", "bad", 2))
    await turns_of_the_loop()
    assert not waiting.done()
    await neutral.ended("train", "good", SCORED)
    assert await soon(waiting) == 1.0


async def scored_and_failed(neutral: NeutralRewards, split: str, *, scored: list[float]) -> None:
    """One group of these rewards, and one called "bad" in which two failed."""
    for _ in range(len(scored) + 2):
        neutral.begun(split)
    for reward in scored:
        await neutral.ended(split, "good", Figures(RolloutStatus.COMPLETED, reward=reward))
    for _ in range(2):
        await neutral.ended(split, "bad", FAILED)


@pytest.mark.parametrize(("split", "said"), [("train", "training"), ("val", "validation")])
async def test_nothing_scored_is_an_error_that_tells_why(split: str, said: str, impatient: None) -> None:
    neutral = NeutralRewards(1.0)
    await scored_and_failed(neutral, split, scored=[])
    with pytest.raises(RolloutError, match=rf"No {said} rollout could be scored. 2 of 2.*http: 2.*the door is stuck"):
        await neutral.reward(split, "bad", 2)


async def test_a_failed_validation_prompt_gets_the_mean_of_all_others() -> None:
    """So the reported mean is that of what was scored; it is known when the last of the validation has ended."""
    neutral = NeutralRewards(0.5)
    for _ in range(3):
        neutral.begun("val")
    await neutral.ended("val", "a", FAILED)
    waiting = asyncio.create_task(neutral.reward("val", "a", 1))
    await neutral.ended("val", "b", Figures(RolloutStatus.COMPLETED, reward=0.0))
    await turns_of_the_loop()
    assert not waiting.done()
    await neutral.ended("val", "c", Figures(RolloutStatus.COMPLETED, reward=1.0))
    assert await soon(waiting) == 0.5


async def test_a_failed_validation_prompt_gets_the_mean_of_its_own_agent() -> None:
    """Trainers tell the rewards of each agent: what another one scored must not be among them."""
    neutral = NeutralRewards(0.5)
    for _ in range(4):
        neutral.begun("val")
    await neutral.ended("val", "a", FAILED, "keypad")
    await neutral.ended("val", "b", Figures(RolloutStatus.COMPLETED, reward=0.25), "keypad")
    await neutral.ended("val", "c", Figures(RolloutStatus.COMPLETED, reward=0.75), "door")
    await neutral.ended("val", "d", FAILED, "lift")
    assert await neutral.reward("val", "a", 1, "keypad") == 0.25
    assert await neutral.reward("val", "d", 1, "lift") == 0.5, "nothing of its own was scored"


async def test_a_failed_validation_prompt_leaves_the_mean_of_its_own_environment() -> None:
    """Validation is told for each agent, so the others' rewards must not come in."""
    neutral = NeutralRewards(0.5)
    told = [("a", "door", None), ("b", "door", 0.25), ("c", "lift", 1.0), ("d", "stairs", None)]
    for _ in told:
        neutral.begun("val")
    for group, agent, reward in told:
        status = RolloutStatus.FAILED if reward is None else RolloutStatus.COMPLETED
        await neutral.ended("val", group, Figures(status, reward=reward), agent)
    assert await neutral.reward("val", "a", 1, "door") == 0.25
    assert await neutral.reward("val", "d", 1, "stairs") == 0.625, "of an agent of which all failed: the mean of all"


async def test_each_validation_is_judged_by_itself(impatient: None) -> None:
    neutral = NeutralRewards(0.5)
    neutral.begun("val")
    await neutral.ended("val", "early", SCORED)
    neutral.begun("train")
    await neutral.ended("train", "a", SCORED)
    neutral.begun("val")
    await neutral.ended("val", "late", FAILED)
    with pytest.raises(RolloutError, match="1 of 1 rollouts failed"):
        await neutral.reward("val", "late", 1)


async def test_training_and_validation_do_not_mix(impatient: None) -> None:
    neutral = NeutralRewards(0.5)
    await scored_and_failed(neutral, "train", scored=[0.0])
    neutral.begun("val")
    await neutral.ended("val", "v", FAILED)
    with pytest.raises(RolloutError, match="No validation rollout"):
        await neutral.reward("val", "v", 1)


async def test_too_many_failures_stop_training() -> None:
    neutral = NeutralRewards(0.5)
    for _ in range(JUDGED // 2 - 2):
        await ended(neutral, "a", SCORED)
    for _ in range(JUDGED // 2 + 1):
        await ended(neutral, "b", FAILED)
    await neutral.reward("train", "a", 1)  # one is missing until the latest are as many as are judged
    await ended(neutral, "a", SCORED)
    with pytest.raises(RolloutError, match=r"max_failed_fraction = 0.5.*129 of 256"):
        await neutral.reward("train", "a", 1)


async def ended(neutral: NeutralRewards, group: str, figures: Figures) -> None:
    neutral.begun("train")
    await neutral.ended("train", group, figures)


async def test_a_late_sibling_finds_no_reward_left_and_gets_the_mean() -> None:
    """More siblings than the trainer was to make of a prompt: none waits, none fails."""
    neutral = NeutralRewards(0.5)
    for figures in (SCORED, Figures(RolloutStatus.COMPLETED, reward=0.0), FAILED, FAILED):
        await ended(neutral, "a", figures)
    for _ in range(2):
        await neutral.reward("train", "a", 4)
    await ended(neutral, "a", FAILED)
    assert await neutral.reward("train", "a", 4) == 0.5


async def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gymlink.rollout.neutral.GROUPS_KEPT", 3)
    neutral = NeutralRewards(0.5)
    for group in "abcd":
        await ended(neutral, group, SCORED)
        await ended(neutral, group, FAILED)
        assert await neutral.reward("train", group, 2) == 1.0
    assert list(neutral._groups) == ["b", "c", "d"]
    assert list(neutral._given) == ["b", "c", "d"]


async def test_others_that_begin_a_little_later_are_waited_for(impatient: None) -> None:
    """The first prompt may fail, whole, before another process has begun its own."""
    neutral = NeutralRewards(1.0)
    await scored_and_failed(neutral, "train", scored=[])
    waiting = asyncio.create_task(neutral.reward("train", "bad", 2))
    await turns_of_the_loop()
    neutral.begun("train")
    await asyncio.sleep(0.05)
    assert not waiting.done(), "it is under way"
    await neutral.ended("train", "good", SCORED)
    assert await soon(waiting) == 1.0


async def test_a_validation_in_parts_is_one() -> None:
    """A trainer may run its prompts some at a time, and wait for those: the last one may be alone."""
    neutral = NeutralRewards(0.5)
    neutral.begun("val")
    await neutral.ended("val", "early", Figures(RolloutStatus.COMPLETED, reward=0.25), "keypad")
    neutral.begun("val")
    await neutral.ended("val", "late", FAILED, "keypad")
    assert await neutral.reward("val", "late", 1, "keypad") == 0.25


async def test_a_validation_without_a_score_may_take_what_training_had() -> None:
    neutral = NeutralRewards(0.5)
    for agent, reward in (("keypad", 0.25), ("door", 1.0)):
        neutral.begun("train")
        await neutral.ended("train", agent, Figures(RolloutStatus.COMPLETED, reward=reward), agent)
    neutral.begun("val")
    await neutral.ended("val", "v", FAILED, "keypad")
    assert await neutral.elsewhere("val", "keypad", or_in_training=True) == 0.25
    neutral.begun("val")
    await neutral.ended("val", "w", Figures(RolloutStatus.COMPLETED, reward=0.5), "door")
    assert await neutral.elsewhere("val", "keypad", or_in_training=True) == 0.25, "of its own agent"
    assert await neutral.elsewhere("val", "door", or_in_training=True) == 0.5
