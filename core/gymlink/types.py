"""What flows through gymlink: sampled turns, the segments a trainer learns from, and rollouts.

Everything here is frozen. Token ids and log probabilities are plain tuples of Python numbers, so that no module
below the plugins needs numpy or torch. Invariants are checked where a value is made, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

TokenIds = tuple[int, ...]
Logprobs = tuple[float, ...]
Message = Mapping[str, Any]
"""An OpenAI chat-completions message."""
Tool = Mapping[str, Any]
"""An OpenAI chat-completions tool: `{"type": "function", "function": {...}}`."""

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the policy samples. The trainer pins it: an agent's own values would bias the importance ratios.

    `top_k` 0 and `min_p` 0.0 mean off. `max_tokens` None means as many as the context holds.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What an engine sampled: ids (the stop token included, when one was sampled) and a logprob for each.

    `weight_version` is that of the weights that sampled. Where they were updated in between, it is the newest, and
    `oldest_weight_version` the first. `routed_experts` is what the engine tells of a mixture-of-experts model's
    routing, for prompt and completion; it is passed on untouched.
    """

    token_ids: TokenIds
    logprobs: Logprobs
    finish_reason: FinishReason
    weight_version: int = 0
    oldest_weight_version: int | None = None
    routed_experts: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                f"{len(self.token_ids)} token ids with {len(self.logprobs)} logprobs: an engine gives one for each."
            )


class ForkCause(StrEnum):
    """Why a prompt was not the exact extension of what was sampled before it."""

    EDITED = "edited"
    """A message that was part of the history was changed or removed."""
    COMPACTED = "compacted"
    """The history came back shorter than what was sampled: the agent summarised or cut it."""
    REASONING_STRIPPED = "reasoning_stripped"
    """Earlier reasoning was left out, as many chat templates do at a new user turn."""
    TOOLS_CHANGED = "tools_changed"
    """The tools (or the template's arguments) differ from those of the earlier turn."""
    RETEMPLATED = "retemplated"
    """The messages agree, but the chat template writes them otherwise than they were sampled, and offers no proven way
    to continue after the sampled ids."""
    RETOKENIZED = "retokenized"
    """The template's text goes on from what was sampled, but its ids are others, and the sampled ones are no whole
    text: a character of which only a part was sampled."""
    FOREIGN_IDS = "foreign_ids"
    """The message carries token ids that this rollout did not sample."""
    RESTARTED = "restarted"
    """Nothing was rewritten: the same prompt came again, or a conversation of its own began (a sub-agent)."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One call of the policy: the exact prompt it saw and the exact ids it sampled.

    `parent` is the index, within its rollout, of the turn that this prompt extends token by token
    (`prompt_ids` starts with the parent's `prompt_ids + completion_ids`); None where a new branch starts.
    `cause` says why a turn after the first has no parent. The other fields are those of its `Generation`.
    """

    prompt_ids: TokenIds
    completion_ids: TokenIds
    logprobs: Logprobs
    finish_reason: FinishReason
    weight_version: int = 0
    parent: int | None = None
    cause: ForkCause | None = None
    oldest_weight_version: int | None = None
    routed_experts: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Segment:
    """One training sequence. `response_*` have one length; `response_mask` is 1 on ids to train, else 0.

    Logprobs are those of the sampling policy where the mask is 1 and where an id was sampled but is trained in
    another segment; 0.0 on ids that the environment wrote. `turns` are the indices, within the rollout, of the turns
    that it is made of, from the first to the last.
    """

    prompt_ids: TokenIds
    response_ids: TokenIds
    response_mask: tuple[int, ...]
    response_logprobs: Logprobs
    turns: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.response_ids) == len(self.response_mask) == len(self.response_logprobs):
            raise ValueError(
                f"response ids, mask and logprobs differ in length: {len(self.response_ids)}, "
                f"{len(self.response_mask)}, {len(self.response_logprobs)}."
            )

    @property
    def trained_tokens(self) -> int:
        return sum(self.response_mask)


class RolloutStatus(StrEnum):
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    """The environment scored it, but the last turn was cut by a length limit or the environment's step limit."""
    FAILED = "failed"
    """Not scored. Never reward 0, never part of a group's baseline."""


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One rollout to collect. `row` is a Gym row with `agent_ref.name` set; `group` names its siblings, if any."""

    row: Mapping[str, Any]
    index: int
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """What became of one request.

    `segments` is empty for a failed rollout. `segments[-1]` is the branch that ends in the final response.
    `failure` names the kind ("timeout", "http", "engine", ...) and `detail` says what happened.
    `dropped` counts sampled tokens that no segment trains, by reason: with the segments' trained tokens it adds
    up to `sampled_tokens`, over all attempts.
    """

    request: RolloutRequest
    rollout_id: str
    status: RolloutStatus
    reward: float | None
    segments: tuple[Segment, ...] = ()
    turns: tuple[Turn, ...] = ()
    failure: str | None = None
    detail: str | None = None
    attempts: int = 1
    seconds: float = 0.0
    seconds_in_model: float = 0.0
    sampled_tokens: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    response: Mapping[str, Any] | None = None
    """Gym's own answer to `/run`, for logs and for reward components; None when it failed."""

    @property
    def trained_tokens(self) -> int:
        return sum(segment.trained_tokens for segment in self.segments)

    @property
    def prefix_breaks(self) -> Mapping[ForkCause, int]:
        """How often a prompt was not the extension of what was sampled, by cause."""
        causes = [turn.cause for turn in self.turns if turn.cause is not None]
        return {cause: causes.count(cause) for cause in dict.fromkeys(causes)}


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The rollouts of one batch in the order of their requests, and the figures to log about them."""

    rollouts: Sequence[Rollout]
    metrics: Mapping[str, float]
