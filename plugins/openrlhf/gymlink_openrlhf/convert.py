"""From a rollout to the sample that OpenRLHF trains: one sequence with ranges of sampled tokens, as a dict.

Each sampled token is in a range, or counted under the reason why not. OpenRLHF cannot leave a sample out, and one
without a sampled token would end its run: a rollout with nothing to train is stood for by a placeholder, one token that
the policy really sampled, with a reward that moves nothing (`gymlink_openrlhf.rewards`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from gymlink.types import Rollout, RolloutStatus

Range = tuple[int, int]
"""First position and the one after the last."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What is trained of a rollout. `ids` and `logprobs` have one length; `ranges` are of the tokens to train.

    `truncated` says that a limit cut it, for which OpenRLHF can take something off its reward.
    """

    ids: Sequence[int]
    ranges: Sequence[Range]
    logprobs: Sequence[float]
    truncated: bool = False

    @property
    def length(self) -> int:
        """From the first token to train to the last: what OpenRLHF calls the response's length."""
        return self.ranges[-1][1] - self.ranges[0][0]


def sample_of(rollout: Rollout) -> Sample:
    """The branch of the final response, up to its last token to train: what the environment wrote after that teaches
    nothing.
    """
    segment = rollout.segments[-1]
    start = len(segment.prompt_ids)
    ranges = list(_ranges(segment.response_mask, start))
    end = ranges[-1][1] if ranges else start
    return Sample(
        [*segment.prompt_ids, *segment.response_ids][:end],
        ranges,
        [0.0] * start + list(segment.response_logprobs[: end - start]),
        rollout.status is RolloutStatus.TRUNCATED,
    )


def _ranges(mask: Sequence[int], start: int) -> Iterable[Range]:
    for trained, run in groupby(range(len(mask)), key=mask.__getitem__):
        positions = list(run)
        if trained:
            yield start + positions[0], start + positions[-1] + 1


def placeholder(prompt_ids: Sequence[int], token: int, logprob: float) -> Sample:
    """One sampled token after its prompt, of which there is at least one."""
    size = len(prompt_ids)
    return Sample([*prompt_ids, token], [(size, size + 1)], [0.0] * size + [logprob])


def sampled_in(rollouts: Sequence[Rollout]) -> Sample | None:
    """A placeholder from the first token that one of these rollouts sampled; None when none did."""
    for rollout in rollouts:
        for turn in rollout.turns:
            if turn.completion_ids and turn.prompt_ids:
                return placeholder(turn.prompt_ids, turn.completion_ids[0], turn.logprobs[0])
    return None


def is_trainable(rollout: Rollout) -> bool:
    """Whether it was scored, and has a token to train."""
    return rollout.reward is not None and rollout.trained_tokens > 0


def response_of(
    rollout: Rollout, sample: Sample, *, prompt: Any, label: Any, reward: float, score: float, with_logprobs: bool
) -> dict[str, Any]:
    """What OpenRLHF's `AgentExecutorBase.execute` returns. Without importance sampling it takes no logprobs.

    `reward` makes the advantage, `score` decides in dynamic filtering. `extra_logs` become figures of OpenRLHF's log;
    all samples must have the same ones.
    """
    return {
        "prompt": prompt,
        "label": label,
        "images": None,
        "mm_train_inputs": None,
        "observation_tokens": list(sample.ids),
        "action_ranges": list(sample.ranges),
        "rollout_log_probs": list(sample.logprobs) if with_logprobs else None,
        "reward": float(reward),
        "scores": float(score),
        "truncated": sample.truncated,
        "extra_logs": {
            "gym_turns": float(len(rollout.turns)),
            "gym_failed": float(rollout.status is RolloutStatus.FAILED),
            "gym_truncated": float(rollout.status is RolloutStatus.TRUNCATED),
            "gym_prefix_breaks": float(sum(rollout.prefix_breaks.values())),
            "gym_tokens_sampled": float(rollout.sampled_tokens),
            "gym_tokens_trained": float(rollout.trained_tokens),
        },
    }
