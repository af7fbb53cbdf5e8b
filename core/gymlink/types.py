"""What flows through gymlink: sampled turns, the segments a trainer learns from, and rollouts.

Everything here is frozen. What grows with a rollout is packed (`gymlink.packed`), whatever sequence of numbers it was
made of, and a turn holds only what it adds: a rollout's memory is linear in its tokens. Invariants are checked where a
value is made, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from typing import Any, Literal, Self

from gymlink.packed import Logprobs, Mask, Packed, TokenIds, pack

__all__ = [
    "CallIds",
    "DropReason",
    "FailureKind",
    "FinishReason",
    "ForkCause",
    "Generation",
    "Logprobs",
    "Mask",
    "Message",
    "Packed",
    "Rollout",
    "RolloutBatch",
    "RolloutRequest",
    "RolloutStatus",
    "Sampling",
    "Segment",
    "TokenIds",
    "Tool",
    "Turn",
]

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
        pack(self, token_ids=TokenIds, logprobs=Logprobs)
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


class _Word(StrEnum):
    """Prints as its word, also inside of a mapping."""

    def __repr__(self) -> str:
        return repr(self.value)


class FailureKind(_Word):
    """Why a rollout has no score. What Gym itself marked as failed has the kind `gym_` and Gym's own word for it."""

    TIMEOUT = "timeout"
    """No result within `rollout.deadline_s`."""
    HTTP = "http"
    """Gym answered with an error."""
    CONNECTION = "connection"
    """A Gym server could not be reached, or broke off."""
    ANSWER = "answer"
    """Gym's answer holds no finite reward."""
    ENGINE = "engine"
    """The policy could not generate."""
    CONTEXT_OVERFLOW = "context_overflow"
    """The first prompt already exceeds the policy's context."""
    NO_MODEL_CALL = "no_model_call"
    """The agent never called the policy."""
    ALIGNMENT = "alignment"
    """The sampled turns do not fit together."""


class DropReason(_Word):
    """Why a sampled token is trained in no segment."""

    FAILED = "failed"
    """Its rollout failed, in its last attempt."""
    FAILED_ATTEMPT = "failed_attempt"
    """It was sampled in an attempt before the last."""
    OTHER_BRANCH = "other_branch"
    """It is on a branch that does not end in the final response, and only the final one is trained."""
    HISTORY_REWRITTEN = "history_rewritten"
    """Its rollout's history was rewritten, and such rollouts are not trained."""
    UNDELIVERED = "undelivered"
    """Nobody read the answer that it is in."""
    OVER_LENGTH = "over_length"
    """It stands beyond the trainer's limit of a response."""
    ALONE_IN_GROUP = "alone_in_group"
    """Too few rollouts of its group were scored to be compared."""
    FILTERED = "filtered"
    """The trainer's dynamic filtering left its group out."""


@dataclass(frozen=True, slots=True)
class CallIds:
    """The ids of one call of the policy. It holds what it adds, so that those of a rollout are linear in its tokens.

    `extends` is the call, of the same rollout, that this prompt goes on from token by token, and `added_ids` are those
    of the prompt that follow all that it held (its prompt and its completion). A call that extends none starts a
    branch, and adds its whole prompt.
    """

    added_ids: TokenIds
    completion_ids: TokenIds
    extends: Self | None = field(default=None, repr=False, compare=False, kw_only=True)
    prompt_tokens: int = field(init=False)
    """How many ids the whole prompt has."""

    def __post_init__(self) -> None:
        pack(self, added_ids=TokenIds, completion_ids=TokenIds)
        before = self.extends.tokens if self.extends is not None else 0
        object.__setattr__(self, "prompt_tokens", before + len(self.added_ids))

    @property
    def tokens(self) -> int:
        """How many ids its prompt and completion have together."""
        return self.prompt_tokens + len(self.completion_ids)

    @property
    def branch(self) -> list[Self]:
        """The calls that it goes on from, from the first of its branch, and itself."""
        calls = [self]
        while (before := calls[-1].extends) is not None:
            calls.append(before)
        return calls[::-1]

    @property
    def ids(self) -> TokenIds:
        """Its prompt and its completion, put together with each access."""
        return TokenIds.joined(chain.from_iterable((call.added_ids, call.completion_ids) for call in self.branch))

    @property
    def prompt_ids(self) -> TokenIds:
        """Its whole prompt, put together with each access."""
        return self.ids[: self.prompt_tokens]

    def has_ids_of(self, other: CallIds) -> bool:
        """Whether prompt and completion are the same ids."""
        return (
            self.prompt_tokens == other.prompt_tokens
            and self.completion_ids == other.completion_ids
            and self.prompt_ids == other.prompt_ids
        )


@dataclass(frozen=True, slots=True)
class Turn(CallIds):
    """One call of the policy: the exact prompt it saw and the exact ids it sampled.

    `cause` says why a turn after the first extends none. `index` is its number within the rollout. The other fields are
    those of its `Generation`.
    """

    logprobs: Logprobs
    finish_reason: FinishReason
    weight_version: int = 0
    cause: ForkCause | None = None
    oldest_weight_version: int | None = None
    routed_experts: Any = field(default=None, repr=False, compare=False)
    index: int = 0

    def __post_init__(self) -> None:
        CallIds.__post_init__(self)
        pack(self, logprobs=Logprobs)

    @property
    def parent(self) -> int | None:
        """The index of the turn that it extends; None where a branch starts."""
        return None if self.extends is None else self.extends.index


@dataclass(frozen=True, slots=True)
class Segment:
    """One training sequence. `response_*` have one length; `response_mask` is 1 on ids to train, else 0.

    Logprobs are those of the sampling policy where the mask is 1 and where an id was sampled but is trained in
    another segment; 0.0 on ids that the environment wrote. `turns` are the indices, within the rollout, of the turns
    that it is made of, from the first to the last, and `trained_turns` those of them whose completions it trains.
    """

    prompt_ids: TokenIds
    response_ids: TokenIds
    response_mask: Mask
    response_logprobs: Logprobs
    turns: tuple[int, ...] = ()
    trained_turns: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        pack(self, prompt_ids=TokenIds, response_ids=TokenIds, response_mask=Mask, response_logprobs=Logprobs)
        if not len(self.response_ids) == len(self.response_mask) == len(self.response_logprobs):
            raise ValueError(
                f"response ids, mask and logprobs differ in length: {len(self.response_ids)}, "
                f"{len(self.response_mask)}, {len(self.response_logprobs)}."
            )

    @property
    def trained_tokens(self) -> int:
        return self.response_mask.count(1)


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
    `failure` is a `FailureKind` or Gym's own mark, and `detail` says what happened.
    `dropped` counts sampled tokens that no segment trains, by `DropReason`: with the segments' trained tokens it adds
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
