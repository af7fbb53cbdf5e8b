"""The truth of one rollout: what was sampled, as a tree of turns.

A prompt is planned from messages alone. It continues the deepest sampled message whose whole preceding history is the
one that was sampled after, and then starts with exactly those ids; otherwise it is a fresh render, and says why.
Token ids that come back on messages only choose between turns of equal text: they are evidence, never believed.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final, Literal

from gymlink.align.base import NO_ARGS, ChatFormat
from gymlink.align.canonical import REASONING_FIELDS, Canonical, canonical, split_reasoning, text_of, tool_calls_of
from gymlink.align.history import Check, Histories, History, copied, link
from gymlink.types import ForkCause, Generation, Message, TokenIds, Tool, Turn

_MARK: Final = "Zq" + secrets.token_hex(12)
_LOST: Final = "\ufffd"
"""What decoding writes for bytes that are no text: a character of which only a part was sampled."""


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """A prompt, and what it continues."""

    prompt_ids: TokenIds
    added_ids: TokenIds
    """Those of the prompt that follow all that the parent held; the whole prompt without one."""
    parent: int | None
    """Index of the turn that this prompt extends."""
    cause: ForkCause | None
    """Why not, when a turn existed before and none is extended."""
    matched: int = field(compare=False)
    """Messages at the beginning that are those of the parent with what it answered; 0 where there is none."""
    known: int = field(compare=False)
    """Those of them whose reasoning is known to be what was sampled, or none."""
    _history: History = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class _Call:
    """What a prompt is asked for."""

    messages: Sequence[Message]
    tools: Sequence[Tool]
    args: Mapping[str, Any]
    history: History


@dataclass(frozen=True, slots=True)
class PendingPlan:
    """A prompt that is not written yet: what it is to go on from, and how much text there is to write."""

    characters: int
    call: _Call = field(repr=False)
    anchor: tuple[int, int] | None
    """A turn, and the messages up to and with what it answered; None where the messages match none."""
    cause: ForkCause | None
    """Why it is rendered afresh."""
    is_extension: bool


@dataclass(frozen=True, slots=True)
class _Sampled:
    """What is remembered of a turn to find it again."""

    message: Message
    reasoning: str | None
    tools: bytes
    asked: bytes
    """Key of the history that this turn answered."""
    length: int
    """Messages of that history."""
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
        self._histories = Histories()

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
        """The prompt for `messages`: `begin`, and `write` until it is written.

        Raises:
            AlignmentError: the chat template refuses these messages.
        """
        plan: PromptPlan | PendingPlan
        plan = self.begin(messages, tools, template_args=template_args, required_prefix=required_prefix)
        while isinstance(plan, PendingPlan):
            plan = self.write(plan)
        return plan

    def begin(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        template_args: Mapping[str, Any] = NO_ARGS,
        required_prefix: Sequence[int] | None = None,
        check: Check | None = None,
    ) -> PendingPlan:
        """What the prompt for `messages` goes on from. They are kept: give new ones to a later call, not these changed.

        `required_prefix` are ids that the caller wants the prompt to start with. Where they are what one turn held
        and these messages continue it, that turn is the one to continue, however its own message is worded now.
        Nothing else changes for them: whether the prompt starts with them is for the caller to see.

        `check` is called with each message that no earlier call of the conversation had, and what it raises is raised.
        """
        history = self._histories.read(messages, tools, template_args, check)
        call = _Call(messages, tools, template_args, history)
        anchor = self._required(history, required_prefix) or self._anchor(call)
        if anchor is None:
            return _fresh(call, self._why_no_anchor(call))
        index, length = anchor
        if self._sampled[index].tools != history.tools:
            return _fresh(call, ForkCause.TOOLS_CHANGED, anchor)
        if self._reasoning_edited(history, length):
            return _fresh(call, ForkCause.EDITED, anchor)
        if self._drop_reasoning and self._leaves_reasoning(index, messages[length:]):
            return _fresh(call, ForkCause.REASONING_STRIPPED, anchor)
        return _extension(call, anchor)

    def write(self, pending: PendingPlan) -> PromptPlan | PendingPlan:
        """One step towards the prompt: it is written, or another way to write it has to be tried.

        It renders and encodes `pending.characters` of text, and only reads what is remembered: it may run in another
        thread while turns are added.

        Raises:
            AlignmentError: the chat template refuses these messages.
        """
        if pending.is_extension and pending.anchor is not None:
            return self._write_extension(pending.call, *pending.anchor)
        plan = self._write_fresh(pending)
        if pending.cause is not ForkCause.REASONING_STRIPPED or pending.anchor is None or plan.parent is not None:
            return plan
        # The template may still write the reasoning: then it stays where it was sampled.
        stripped = self._strips_reasoning(pending.call, pending.anchor[0], plan.prompt_ids)
        return plan if stripped else _extension(pending.call, pending.anchor)

    def _write_extension(self, call: _Call, index: int, length: int) -> PromptPlan | PendingPlan:
        turn = self._turns[index]
        held = turn.ids
        added = self._format.extend(
            held[: turn.prompt_tokens],
            turn.completion_ids,
            turn.finish_reason,
            call.messages[length:],
            call.tools,
            template_args=call.args,
            answered=self._sampled[index].message,
        )
        if added is None:
            return _fresh(call, self._why_not_extended(call, index, length), (index, length))
        ids = TokenIds(added)
        return PromptPlan(held + ids, ids, index, None, length, length, call.history)

    def add(self, plan: PromptPlan, generation: Generation, message: Message) -> Turn:
        """Remember what was sampled after `plan`, and the assistant message that the agent was given for it."""
        turn = Turn(
            added_ids=plan.added_ids,
            completion_ids=generation.token_ids,
            logprobs=generation.logprobs,
            finish_reason=generation.finish_reason,
            weight_version=generation.weight_version,
            extends=None if plan.parent is None else self._turns[plan.parent],
            cause=plan.cause,
            oldest_weight_version=generation.oldest_weight_version,
            routed_experts=generation.routed_experts,
            index=len(self._turns),
        )
        history, index = plan._history, turn.index
        form = canonical(message)
        message = copied(message)
        self._histories.expect(history, message, form)
        said = _after(history, message, form)
        digests = frozenset(one.digest for one, _ in said)
        self._turns.append(turn)
        self._sampled.append(_Sampled(message, form.reasoning, history.tools, history.key, len(history), digests))
        self._longest = max(self._longest, len(history) + (not form.is_silent))
        self._prompts.add(history.key)
        self._openings.update(history.chain[1:2])
        for place in range(plan.known, len(history)):
            self._remember_reasoning(history.chain[place + 1], history.forms[place].reasoning)
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

    def _required(self, history: History, prefix: Sequence[int] | None) -> tuple[int, int] | None:
        """(turn, messages up to and with it) of the turn that held exactly these ids, where this history goes on."""
        if not prefix:
            return None
        ids = TokenIds(prefix)
        turns = [turn.index for turn in self._turns if turn.tokens == len(ids) and turn.ids == ids]
        for length in range(len(history), 0, -1):
            ended = self._ending.get(history.chain[length], ())
            answers = history.forms[length - 1].role == "assistant"
            for index in reversed(turns):
                if index in ended or (answers and self._sampled[index].asked == history.chain[length - 1]):
                    return index, length
        return None

    def _anchor(self, call: _Call) -> tuple[int, int] | None:
        """(turn, messages up to and with it) of the deepest sampled message in this history."""
        history = call.history
        for length in range(len(history), 0, -1):
            turns = self._ending.get(history.chain[length])
            if not turns:
                continue
            echoed = history.forms[length - 1].role == "assistant"
            if not echoed and length == len(history):
                continue  # the same prompt again, not the history of an empty answer to it
            return self._choose(turns, call.messages[length - 1] if echoed else {}, history.tools), length
        return None

    def _choose(self, turns: Sequence[int], answer: Message, tools: bytes) -> int:
        """Among turns of one text: the one whose ids came back, else one with these tools, else the latest."""

        if len(turns) == 1:
            return turns[0]
        prompt, completion = _ids(answer.get("prompt_token_ids")), _ids(answer.get("generation_token_ids"))

        def rank(index: int) -> tuple[bool, bool, bool, int]:
            turn = self._turns[index]
            same_prompt = prompt is not None and len(prompt) == turn.prompt_tokens and prompt == turn.prompt_ids
            return completion == turn.completion_ids, same_prompt, self._sampled[index].tools == tools, index

        return max(turns, key=rank)

    def _remember_reasoning(self, key: bytes, reasoning: str | None) -> None:
        if reasoning and reasoning not in (known := self._reasonings.setdefault(key, [])):
            known.append(reasoning)

    def _reasoning_edited(self, history: History, length: int) -> bool:
        """Whether a message of the matched history carries reasoning that was never there. A missing one is fine."""
        for place in range(history.checked, length):
            reasoning = history.forms[place].reasoning
            if reasoning is not None and reasoning not in self._reasonings.get(history.chain[place + 1], ()):
                return True
            history.checked = place + 1  # what was sampled is not forgotten, so later calls need not look again
        return False

    def _leaves_reasoning(self, index: int, new_messages: Sequence[Message]) -> bool:
        """Whether a new user turn follows reasoning that is still in the prompt."""
        if not any(message.get("role") == "user" for message in new_messages):
            return False
        return any(self._sampled[turn.index].reasoning for turn in self._turns[index].branch)

    # -- prompts that extend nothing by plan ----------------------------------------------------------------------

    def _write_fresh(self, pending: PendingPlan) -> PromptPlan:
        """The template's own render of everything, with the reasoning that the agent left out put back for it.

        It may still read on from what was sampled: what was edited is nothing that the template writes, or other
        arguments of it change only what comes next. Then nothing is forked.
        """
        call, cause = pending.call, pending.cause
        ids = TokenIds(self._format.render(self._restored(call), call.tools, template_args=call.args))
        if not self._turns:
            return PromptPlan(ids, ids, None, None, 0, 0, call.history)
        nearest = len(self._turns) - 1 if pending.anchor is None else pending.anchor[0]
        turn = self._turns[nearest]
        held, decode = turn.ids, self._format.decode
        text, begun = decode(ids), decode(held)
        if turn.completion_ids and text.startswith(begun):
            added = TokenIds(self._format.encode(text[len(begun) :]))
            matched = 0 if pending.anchor is None else pending.anchor[1]
            plan = PromptPlan(held + added, added, nearest, None, matched, 0, call.history)
            if decode(plan.prompt_ids) == text and _LOST not in decode(turn.completion_ids):
                return plan
            cause = ForkCause.RETOKENIZED
        elif cause is ForkCause.RETEMPLATED and self._strips_reasoning(call, nearest, ids):
            cause = ForkCause.REASONING_STRIPPED
        return PromptPlan(ids, ids, None, cause, 0, 0, call.history)

    def _restored(self, call: _Call) -> list[Message]:
        """The messages, with the reasoning that was sampled where they carry none."""
        restored = []
        for message, form, key in zip(call.messages, call.history.forms, call.history.chain[1:], strict=True):
            known = self._reasonings.get(key)
            missing = form.role == "assistant" and known and not form.reasoning
            restored.append({**message, "reasoning_content": known[-1]} if missing and known else message)
        return restored

    def _strips_reasoning(self, call: _Call, index: int, rendered: TokenIds) -> bool:
        """Whether the template leaves out reasoning that the prompt of this turn's branch still holds."""
        root = self._turns[index].branch[0]
        begins, text = self._sampled[root.index].length, self._format.decode(rendered)
        marked, marks = self._restored(call), 0
        for place in range(begins, len(marked)):
            reasoning = canonical(marked[place]).reasoning
            if reasoning and reasoning not in text:
                return True
            if reasoning:  # it shows, or some other text reads like it: a word that is nowhere else tells
                marked[place] = _with_reasoning(marked[place], _MARK)
                marks += 1
        if not marks:
            return False
        return (
            self._format.decode(self._format.render(marked, call.tools, template_args=call.args)).count(_MARK) < marks
        )

    def _why_no_anchor(self, call: _Call) -> ForkCause | None:
        if not self._turns:
            return None
        history = call.history
        answered = any(form.role == "assistant" and not form.is_silent for form in history.forms)
        instructed = bool(history.forms) and history.forms[0].role == "system"
        if history.key in self._prompts or (instructed and not answered and history.chain[1] not in self._openings):
            return ForkCause.RESTARTED
        if self._has_foreign_ids(call.messages):
            return ForkCause.FOREIGN_IDS
        return ForkCause.COMPACTED if len(history) < self._longest else ForkCause.EDITED

    def _why_not_extended(self, call: _Call, index: int, length: int) -> ForkCause:
        """The anchor is sound but nothing continues it: a later sampled message was replaced, or it is the template."""
        if any(form.role == "assistant" for form in call.history.forms[length:]):
            if self._has_foreign_ids(call.messages[length:]):
                return ForkCause.FOREIGN_IDS
            if any(turn.parent == index for turn in self._turns):
                return ForkCause.EDITED
        return ForkCause.RETEMPLATED

    def _has_foreign_ids(self, messages: Sequence[Message]) -> bool:
        ours = {turn.completion_ids for turn in self._turns}
        echoed = (_ids(message.get("generation_token_ids")) for message in messages)
        return any(ids and ids not in ours for ids in echoed)


def _extension(call: _Call, anchor: tuple[int, int]) -> PendingPlan:
    return PendingPlan(_characters(call.messages[anchor[1] :]), call, anchor, None, is_extension=True)


def _fresh(call: _Call, cause: ForkCause | None, anchor: tuple[int, int] | None = None) -> PendingPlan:
    return PendingPlan(_characters(call.messages), call, anchor, cause, is_extension=False)


def _characters(messages: Sequence[Message]) -> int:
    texts = (text_of(message.get("content")) for message in messages)
    calls = (str(call) for message in messages for call in tool_calls_of(message))
    return sum(map(len, chain(texts, calls)))


def _with_reasoning(message: Message, reasoning: str) -> Message:
    """The message with other reasoning in the same place: in its own field, or in the tags that begin its content."""
    fields = [name for name in REASONING_FIELDS if message.get(name)]
    if fields:
        return {**message, **dict.fromkeys(fields, reasoning)}
    return {**message, "content": f"<think>\n{reasoning}\n</think>\n\n{split_reasoning(message)[0]}"}


def _after(history: History, message: Message, form: Canonical) -> list[tuple[Canonical, bytes]]:
    """Forms of the message and keys of the histories that mean "this was sampled": a prefill may come back joined."""
    said = [(form, link(history.key, form))]
    if history.prefilled is not None:
        joined = canonical({**message, "content": history.prefilled + text_of(message.get("content"))})
        said.append((joined, link(history.chain[-2], joined)))
    return said


def _call_ids(message: Message) -> list[str]:
    return [str(call.get("id") or "") for call in tool_calls_of(message)]


def _ids(value: Any) -> TokenIds | None:
    """Ids as they came back on a message, or None where they are none: agents send null, strings and worse."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        return None
    try:
        return TokenIds(map(int, value))
    except (TypeError, ValueError, OverflowError):
        return None
