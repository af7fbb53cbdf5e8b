"""Rewards for failed rollouts of trainers that cannot leave a rollout out: rewards that move nothing.

Such a trainer takes a reward for every rollout, and each is in the baseline of its group. So a failed one gets one with
which the group's mean stays what it is without it, and its spread too wherever that is possible: with two or more
failures, not with one, where the siblings' normalised advantages grow by sqrt((n-1)/(n-2)), n being the group's size.
(Were there such a reward f beside m = n-1 scored ones of mean u and sample variance v > 0: keeping the mean asks for
f = u, and then the variance of all is v (m-1)/m, which is not v.)
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from statistics import fmean, stdev

from gymlink.errors import RolloutError
from gymlink.rollout.figures import Figures, describe_failures, refuse_if_too_many_failed

GROUPS_KEPT = 10_000
JUDGED = 256
"""Failures are judged over this many of the latest rollouts, unless a batch is known to have fewer."""
GRACE_S = 2.0
"""Before a run is ended because nothing was scored and nothing is under way, others have this long to begin: the first
to fail may be faster than another process is to start."""


def neutral_rewards(scored: Sequence[float], failed: int) -> list[float]:
    """Rewards for `failed` rollouts beside siblings with the rewards `scored`, of which there is at least one.

    The mean of all is the mean of `scored`. With two or more of each, the sample variance is theirs as well: the
    added rewards have the sum 0 and the sum of squares `failed * s**2` around the mean.
    """
    mean = fmean(scored)
    if failed == 1 or len(scored) == 1:
        return [mean] * failed
    deviation = stdev(scored) * math.sqrt(failed / 2)
    return [mean + deviation, mean - deviation, *[mean] * (failed - 2)]


class NeutralRewards:
    """Knows the latest rollouts of a job, by split and by group. Used from one event loop."""

    def __init__(self, max_failed_fraction: float) -> None:
        self._allowed = max_failed_fraction
        self.batch = JUDGED
        """How many rollouts the trainer takes at a time."""
        self._groups: OrderedDict[str, list[Figures]] = OrderedDict()
        self._given: dict[str, list[float]] = {}
        self._latest: dict[str, deque[tuple[str, Figures]]] = {"train": deque(maxlen=JUDGED), "val": deque()}
        self._in_flight = {"train": 0, "val": 0}
        self._validated = False
        """Whether the validation in `_latest` is over: something was trained on after it."""
        self._changed = asyncio.Condition()

    def begun(self, split: str) -> None:
        """A rollout begins. A validation may come in parts: it is one until training goes on."""
        if split == "val" and self._validated:
            self._latest[split].clear()
        self._validated = split == "train"
        self._in_flight[split] += 1

    async def ended(self, split: str, group: str, figures: Figures, agent: str = "") -> None:
        """`agent` is who ran it: validation is told for each."""
        async with self._changed:
            self._in_flight[split] -= 1
            self._latest[split].append((agent, figures))
            self._groups.setdefault(group, []).append(figures)
            if len(self._groups) > GROUPS_KEPT:
                self._given.pop(self._groups.popitem(last=False)[0], None)
            self._changed.notify_all()

    async def reward(self, split: str, group: str, siblings: int, agent: str = "") -> float:
        """The reward for one failed rollout of a group, once all `siblings` of the group have ended.

        In validation it is the mean: there is no spread to keep, and nothing may look better than the best.

        Raises:
            RolloutError: too many of the latest training rollouts failed, or all that were begun.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._groups.get(group, ())) >= siblings)
        scored = [one.reward for one in self._groups[group] if one.reward is not None]
        if not scored:
            return await self.elsewhere(split, agent)
        self.judge(split)
        if split == "val":
            return fmean(scored)
        if group not in self._given:
            failed = len(self._groups[group]) - len(scored)
            self._given[group] = neutral_rewards(scored, failed)
        given = self._given[group]
        return given.pop() if given else fmean(scored)

    async def elsewhere(self, split: str, agent: str = "", *, or_in_training: bool = False) -> float:
        """The reward for a rollout in whose group none was scored: the mean of the latest ones, of its agent if any.

        A validation's mean is over all prompts of an agent, so that one is neutral there once those under way have
        ended. In training any will do, as soon as there is one. With `or_in_training`, a validation in which nothing
        of an agent was scored takes the mean of its training rollouts.

        Raises:
            RolloutError: too many of the latest training rollouts failed, or all that were begun.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._known(split))
        splits = dict.fromkeys([split, "train"] if or_in_training else [split])
        if not any(map(self._scored, splits)):
            await asyncio.sleep(GRACE_S)
            async with self._changed:
                await self._changed.wait_for(lambda: self._known(split))
            if not any(map(self._scored, splits)):
                latest = [figures for _, figures in self._latest[split]]
                raise RolloutError(f"No {_NAMES[split]} rollout could be scored. {describe_failures(latest)}")
        self.judge(split)
        scored = [self._scored(one) for one in splits]
        of_agent = [[reward for who, reward in those if who == agent] for those in scored]
        of_all = [[reward for _, reward in those] for those in scored]
        return fmean(next(rewards for rewards in (*of_agent, *of_all) if rewards))

    def judge(self, split: str) -> None:
        """Raises `RolloutError` when too many of the latest training rollouts failed."""
        latest = [figures for _, figures in self._latest[split]]
        if split == "train" and len(latest) >= min(JUDGED, self.batch):
            refuse_if_too_many_failed(latest, self._allowed)

    def _known(self, split: str) -> bool:
        """Whether there is no use in waiting for those that are under way."""
        return not self._in_flight[split] or (split == "train" and bool(self._scored(split)))

    def _scored(self, split: str) -> list[tuple[str, float]]:
        """Agent and reward of those among the latest that were scored."""
        return [(agent, one.reward) for agent, one in self._latest[split] if one.reward is not None]


_NAMES = {"train": "training", "val": "validation"}
