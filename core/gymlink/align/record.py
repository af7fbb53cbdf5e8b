"""The truth of one rollout: what was sampled, as a tree of turns.

A prompt is planned from messages alone. It continues the deepest sampled message whose whole preceding history is the
one that was sampled after, and then starts with exactly those ids; otherwise it is a fresh render, and says why.
Token ids that come back on messages only choose between turns of equal text: they are evidence, never believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final, Literal

from gymlink.align.base import NO_ARGS, ChatFormat
from gymlink.align.canonical import READ_FIELDS, Canonical, canonical, text_of, tool_calls_of, tools_digest
from gymlink.types import ForkCause, Generation, Message, TokenIds, Tool, Turn

_ROOT: Final = b""


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """A prompt, and what it continues."""

    prompt_ids: TokenIds
    parent: int | None
    """Index of the turn whose `prompt_ids + completion_ids` this prompt starts with."""
    cause: ForkCause | None
    """Why not, when a turn existed before and none is extended."""
    _history: _History = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class _History:
    """The messages of one call, hashed so that equal prefixes have equal keys."""

    messages: tuple[Message, ...]
    forms: tuple[Canonical, ...]
    chain: tuple[bytes, ...]
    """`chain[n]` stands for the first n messages; silent assistant messages leave it unchanged."""
    tools: bytes
    prefilled: bool

    @property
    def key(self) -> bytes:
        return self.chain[-1]


@dataclass(frozen=True, slots=True)
class _Sampled:
    """What is remembered of a turn to find it again."""

    message: Message
    reasoning: str | None
    tools: bytes
    asked: bytes
    """Key of the history that this turn answered."""
    digests: frozenset[bytes]
    """Of the message, in each form in which it may come back."""


class RolloutRecord:
    """Plans prompts for one rollout and remembers what was sampled after them.

    Calls may overlap: any number of `plan` before the matching `add`. Nothing here is asynchronous or locked; use it
    from one thread.
    """

    def __init__(self, rollout_id: str, format: ChatFormat, *, reasoning: Literal["keep", "drop"] = "keep") -> None:  # noqa: A002
        self.rollout_id = rollout_id
        self._format = format
        self._drop_reasoning = reasoning == "drop"
        self._turns: list[Turn] = []
        self._sampled: list[_Sampled] = []
        self._ending: dict[bytes, list[int]] = {}  # history key -> turns that a history with this key ends with
        self._prompts: set[bytes] = set()
        self._openings: set[bytes] = set()
        self._reasonings: dict[bytes, list[str]] = {}  # history key -> reasoning seen on its last message
        self._longest = 0
        self._latest: _History | None = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Every call of the policy, in the order it was added."""
        return tuple(self._turns)

    def plan(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        template_args: Mapping[str, Any] = NO_ARGS,
        required_prefix: Sequence[int] | None = None,
    ) -> PromptPlan:
        """The prompt for `messages`. They are kept: give new ones to a later call, never these changed in place.

        `required_prefix` are ids that the caller wants the prompt to start with. Where they are what one turn held
        and these messages continue it, that turn is the one to continue, however its own message is worded now.
        Nothing else changes for them: whether the prompt starts with them is for the caller to see.

        Raises:
            AlignmentError: the chat template refuses these messages.
        """
        history = self._latest = _hash(messages, tools, template_args, self._latest)
        anchor = self._required(history, required_prefix) or self._anchor(history)
        if anchor is None:
            return self._fresh(history, tools, template_args, self._why_no_anchor(history))
        index, length = anchor
        if self._sampled[index].tools != history.tools:
            return self._fresh(history, tools, template_args, ForkCause.TOOLS_CHANGED)
        if self._reasoning_edited(history, length):
            return self._fresh(history, tools, template_args, ForkCause.EDITED)
        if self._drop_reasoning and self._leaves_reasoning(index, history.messages[length:]):
            return self._fresh(history, tools, template_args, ForkCause.REASONING_STRIPPED, kept=index)

        turn = self._turns[index]
        added = self._format.extend(
            turn.prompt_ids,
            turn.completion_ids,
            turn.finish_reason,
            history.messages[length:],
            tools,
            template_args=template_args,
            answered=self._sampled[index].message,
        )
        if added is None:
            return self._fresh(history, tools, template_args, self._why_not_extended(history, index, length))
        return PromptPlan(turn.prompt_ids + turn.completion_ids + added, index, None, history)

    def add(self, plan: PromptPlan, generation: Generation, message: Message) -> Turn:
        """Remember what was sampled after `plan`, and the assistant message that the agent was given for it."""
        turn = Turn(
            prompt_ids=plan.prompt_ids,
            completion_ids=generation.token_ids,
            logprobs=generation.logprobs,
            finish_reason=generation.finish_reason,
            weight_version=generation.weight_version,
            parent=plan.parent,
            cause=plan.cause,
            oldest_weight_version=generation.oldest_weight_version,
            routed_experts=generation.routed_experts,
        )
        history = plan._history
        index = len(self._turns)
        form = canonical(message)
        self._turns.append(turn)
        said = _after(history, message, form)
        self._sampled.append(
            _Sampled(message, form.reasoning, history.tools, history.key, frozenset(form.digest for form, _ in said))
        )
        self._longest = max(self._longest, len(history.messages) + (not form.is_silent))
        self._prompts.add(history.key)
        if history.forms:
            self._openings.add(history.forms[0].digest)
        for position, seen in enumerate(history.forms):
            self._remember_reasoning(history.chain[position + 1], seen.reasoning)

        for _, key in said:
            self._ending.setdefault(key, []).append(index)
            self._remember_reasoning(key, form.reasoning)
        return turn

    def turn_of(self, message: Message) -> int | None:
        """Index of the turn whose answer this message is, judged by what it says; None where there is none.

        Of turns that said the same, the one whose tool calls have these ids, else whose reasoning is this, else the
        latest.
        """
        form = canonical(message)
        calls, said = _call_ids(message), form.digest

        def rank(index: int) -> tuple[bool, bool, int]:
            sampled = self._sampled[index]
            return _call_ids(sampled.message) == calls, form.reasoning in (None, sampled.reasoning), index

        same = (index for index, sampled in enumerate(self._sampled) if said in sampled.digests)
        return max(same, key=rank, default=None)

    def _required(self, history: _History, prefix: Sequence[int] | None) -> tuple[int, int] | None:
        """(turn, messages up to and with it) of the turn that held exactly these ids, where this history goes on."""
        if not prefix:
            return None
        ids = tuple(prefix)
        turns = [index for index, turn in enumerate(self._turns) if _held(turn, len(ids)) == ids]
        for length in range(len(history.messages), 0, -1):
            ended = self._ending.get(history.chain[length], ())
            answers = history.forms[length - 1].role == "assistant"
            for index in reversed(turns):
                if index in ended or (answers and self._sampled[index].asked == history.chain[length - 1]):
                    return index, length
        return None

    def _anchor(self, history: _History) -> tuple[int, int] | None:
        """(turn, messages up to and with it) of the deepest sampled message in this history."""
        for length in range(len(history.messages), 0, -1):
            turns = self._ending.get(history.chain[length])
            if not turns:
                continue
            answer = history.messages[length - 1]
            echoed = history.forms[length - 1].role == "assistant"
            if not echoed and length == len(history.messages):
                continue  # the same prompt again, not the history of an empty answer to it
            return self._choose(turns, answer if echoed else {}, history.tools), length
        return None

    def _choose(self, turns: Sequence[int], answer: Message, tools: bytes) -> int:
        """Among turns of one text: the one whose ids came back, else one with these tools, else the latest."""

        def rank(index: int) -> tuple[bool, bool, bool, int]:
            turn = self._turns[index]
            return (
                _ids(answer.get("generation_token_ids")) == turn.completion_ids,
                _ids(answer.get("prompt_token_ids")) == turn.prompt_ids,
                self._sampled[index].tools == tools,
                index,
            )

        return turns[0] if len(turns) == 1 else max(turns, key=rank)

    def _remember_reasoning(self, key: bytes, reasoning: str | None) -> None:
        known = self._reasonings.setdefault(key, [])
        if reasoning and reasoning not in known:
            known.append(reasoning)

    def _reasoning_edited(self, history: _History, length: int) -> bool:
        """Whether a message of the matched history carries reasoning that was never there. A missing one is fine."""
        return any(
            form.reasoning is not None and form.reasoning not in self._reasonings.get(key, ())
            for form, key in zip(history.forms[:length], history.chain[1:], strict=False)
        )

    def _leaves_reasoning(self, index: int, new_messages: Sequence[Message]) -> bool:
        """Whether a new user turn follows reasoning that is still in the prompt."""
        if not any(message.get("role") == "user" for message in new_messages):
            return False
        current: int | None = index
        while current is not None:
            if self._sampled[current].reasoning:
                return True
            current = self._turns[current].parent
        return False

    def _fresh(
        self,
        history: _History,
        tools: Sequence[Tool],
        template_args: Mapping[str, Any],
        cause: ForkCause | None,
        *,
        kept: int | None = None,
    ) -> PromptPlan:
        """The template's own render of everything, with the reasoning that the agent left out put back for it."""
        messages = [
            self._restored(*item) for item in zip(history.messages, history.forms, history.chain[1:], strict=True)
        ]
        ids = self._format.render(messages, tools, template_args=template_args)
        if kept is not None:
            turn = self._turns[kept]
            held = turn.prompt_ids + turn.completion_ids
            if ids[: len(held)] == held:  # this template leaves earlier reasoning where it was
                return PromptPlan(ids, kept, None, history)
        return PromptPlan(ids, None, cause, history)

    def _restored(self, message: Message, form: Canonical, key: bytes) -> Message:
        known = self._reasonings.get(key)
        if form.role != "assistant" or not known or form.reasoning:
            return message
        return {**message, "reasoning_content": known[-1]}

    def _why_no_anchor(self, history: _History) -> ForkCause | None:
        if not self._turns:
            return None
        answers = [form for form in history.forms if form.role == "assistant" and not form.is_silent]
        opening = history.forms[0] if history.forms else None
        if history.key in self._prompts or (
            not answers and opening and opening.role == "system" and opening.digest not in self._openings
        ):
            return ForkCause.RESTARTED
        if self._has_foreign_ids(history.messages):
            return ForkCause.FOREIGN_IDS
        return ForkCause.COMPACTED if len(history.messages) < self._longest else ForkCause.EDITED

    def _why_not_extended(self, history: _History, index: int, length: int) -> ForkCause:
        """The anchor is sound but nothing continues it: a later sampled message was replaced, or it is the template."""
        later = [form for form in history.forms[length:] if form.role == "assistant"]
        if later and self._has_foreign_ids(history.messages[length:]):
            return ForkCause.FOREIGN_IDS
        if later and any(turn.parent == index for turn in self._turns):
            return ForkCause.EDITED
        return ForkCause.RETEMPLATED

    def _has_foreign_ids(self, messages: Sequence[Message]) -> bool:
        ours = {turn.completion_ids for turn in self._turns}
        echoed = (_ids(message.get("generation_token_ids")) for message in messages)
        return any(ids and ids not in ours for ids in echoed)


def _hash(
    messages: Sequence[Message], tools: Sequence[Tool], template_args: Mapping[str, Any], known: _History | None
) -> _History:
    """`known` is a history whose work is taken over as far as the messages are the same: most calls only add some."""
    same = 0 if known is None else _common_length(messages, known.messages)
    forms = (*(known.forms[:same] if known else ()), *(canonical(message) for message in messages[same:]))
    chain = [*(known.chain[: same + 1] if known else (_ROOT,))]
    for form in forms[same:]:
        chain.append(_link(chain[-1], form))
    prefilled = bool(template_args.get("continue_final_message")) and bool(forms) and forms[-1].role == "assistant"
    return _History(tuple(messages), forms, tuple(chain), tools_digest(tools, template_args), prefilled)


def _common_length(messages: Sequence[Message], others: Sequence[Message]) -> int:
    """How many messages at the beginning are equal in all that `canonical` looks at."""
    for length, (one, other) in enumerate(zip(messages, others, strict=False)):
        if any(one.get(name) != other.get(name) for name in READ_FIELDS):
            return length
    return min(len(messages), len(others))


def _held(turn: Turn, length: int) -> TokenIds | None:
    """The turn's prompt and completion, if together they have this length."""
    fits = len(turn.prompt_ids) + len(turn.completion_ids) == length
    return turn.prompt_ids + turn.completion_ids if fits else None


def _after(history: _History, message: Message, form: Canonical) -> list[tuple[Canonical, bytes]]:
    """Forms of the message and keys of the histories that mean "this was sampled": a prefill may come back joined."""
    said = [(form, _link(history.key, form))]
    if history.prefilled:
        before = text_of(history.messages[-1].get("content"))
        joined = canonical({**message, "content": before + text_of(message.get("content"))})
        said.append((joined, _link(history.chain[-2], joined)))
    return said


def _call_ids(message: Message) -> list[str]:
    return [str(call.get("id") or "") for call in tool_calls_of(message)]


def _link(key: bytes, form: Canonical) -> bytes:
    return key if form.is_silent else blake2b(key + form.digest, digest_size=16).digest()


def _ids(value: Any) -> TokenIds | None:
    """Ids as they came back on a message, or None where they are none: agents send null, strings and worse."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        return None
    try:
        return tuple(map(int, value))
    except (TypeError, ValueError, OverflowError):
        return None
