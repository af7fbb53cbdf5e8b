"""The messages of a call, read once: two histories with one beginning have equal keys for it.

Most calls only add messages to the history of an earlier call. What was worked out for that one is taken over as far as
the messages are the same, so a call costs what it adds. Conversations may take turns in one rollout; each goes on from
its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, NamedTuple

from gymlink.align.canonical import ID_FIELDS, Canonical, canonical, text_of, tool_calls_of, tools_digest
from gymlink.types import Message, Tool

ROOT: Final = b""
"""The key of a history without messages."""
MAX_CONVERSATIONS: Final = 64
"""Histories that are remembered: more than there are conversations at a time in one rollout."""
_IDS: Final = frozenset(ID_FIELDS)
"""Fields that grow with the history, come with each answer, and are never believed."""
MAX_UNANSWERED: Final = 4
"""Histories that are remembered though no turn came of them, for a call that is made again."""

Check = Callable[[int, Message], None]
"""Called with a message and its place, once for each that no earlier call of its conversation had; may raise."""


class Form(NamedTuple):
    """What is kept of a message's canonical form, once its digest is in the chain."""

    role: str
    reasoning: str | None
    is_silent: bool


@dataclass(slots=True, eq=False)
class History:
    """The messages of one call. It holds on to no ids of theirs."""

    read: tuple[Message, ...]
    """The messages as they came, but for ids and logprobs."""
    forms: tuple[Form, ...]
    chain: tuple[bytes, ...]
    """`chain[n]` stands for the first n messages; silent assistant messages leave it unchanged."""
    tools: bytes = b""
    prefilled: str | None = None
    """The text of a last message that is to be continued."""
    has_objects: bool = False
    """Whether a tool is called with something else than text: 1 and true are equal for Python, and not the same."""
    goes_on_from: History | None = None
    """The history with an answer that it extends, until an answer comes of it too."""
    checked: int = 0
    """Messages at the beginning whose reasoning is known to be what was sampled, or none."""

    def __len__(self) -> int:
        return len(self.forms)

    @property
    def key(self) -> bytes:
        return self.chain[-1]


class Histories:
    """Reads the histories of one rollout's calls."""

    def __init__(self) -> None:
        self._latest: list[History] = []  # the latest of each conversation; the one that was used last is last
        self._unanswered: list[History] = []

    def read(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        template_args: Mapping[str, Any],
        check: Check | None = None,
    ) -> History:
        """The history of these messages. What `check` raises is raised, and the messages are not remembered."""
        read = tuple([message if _IDS.isdisjoint(message) else _without_ids(message) for message in messages])
        known, same = self._nearest(read)
        forms, chain, has_objects = [*known.forms[:same]], [*known.chain[: same + 1]], known.has_objects
        for place in range(same, len(messages)):
            message = messages[place]
            if check is not None:
                check(place, message)
            form = canonical(message)
            has_objects = has_objects or _has_objects(message)
            forms.append(_kept(form))
            chain.append(link(chain[-1], form))
        resumed = template_args.get("continue_final_message") and forms and forms[-1].role == "assistant"
        history = History(
            read=known.read[:same] + read[same:],  # the texts that are held already, not the equal ones of this call
            forms=tuple(forms),
            chain=tuple(chain),
            tools=tools_digest(tools, template_args),
            prefilled=text_of(messages[-1].get("content")) if resumed else None,
            has_objects=has_objects,
            goes_on_from=self._answered(known) if same and same == len(known) else None,
            checked=min(known.checked, same),
        )
        self._unanswered = [*self._unanswered, history][-MAX_UNANSWERED:]
        return history

    def expect(self, history: History, answer: Message, form: Canonical) -> None:
        """An agent goes on from this history with the answer that it was given: most send it back as it is.

        The answer is kept: give a copy of what others may change.
        """
        expected = History(
            read=(*history.read, answer),
            forms=(*history.forms, _kept(form)),
            chain=(*history.chain, link(history.key, form)),
            has_objects=history.has_objects or _has_objects(answer),
            checked=history.checked,
        )
        gone = (history, history.goes_on_from)
        self._unanswered = [one for one in self._unanswered if one not in gone]
        self._latest = [*(one for one in self._latest if one not in gone), expected][-MAX_CONVERSATIONS:]
        history.goes_on_from = None

    def _answered(self, known: History) -> History | None:
        """This history, or the one that it extends where no answer came of it: none holds on to a chain of others."""
        return known.goes_on_from if any(one is known for one in self._unanswered) else known

    def _nearest(self, read: tuple[Message, ...]) -> tuple[History, int]:
        """The remembered history that begins like this one for longest, and for how many messages."""
        nearest, most = History((), (), (ROOT,)), 0
        for history in (*reversed(self._unanswered), *reversed(self._latest)):
            if most and history.read[:most] != read[:most]:
                continue
            same = _common_length(history.read, read)
            if history.has_objects and repr(history.read[:same]) != repr(read[:same]):
                continue
            if same > most:
                nearest, most = history, same
        return nearest, most


def _without_ids(message: Message) -> Message:
    return {name: value for name, value in message.items() if name not in _IDS}


def _has_objects(message: Message) -> bool:
    """Whether it calls a tool with something else than text."""
    return any(type(one) is not str for one in map(_arguments, tool_calls_of(message)))


def _arguments(call: Mapping[str, Any]) -> Any:
    function = call.get("function")
    return function.get("arguments") if isinstance(function, Mapping) else None


def copied(answer: Message) -> Message:
    """The answer as it is now: whoever has it may change it."""
    calls = answer.get("tool_calls")
    if not isinstance(calls, list):
        return {**answer}
    return {**answer, "tool_calls": [_copied_call(call) if isinstance(call, Mapping) else call for call in calls]}


def _copied_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    return {**call, "function": {**function}} if isinstance(function, Mapping) else {**call}


def _kept(form: Canonical) -> Form:
    return Form(form.role, form.reasoning, form.is_silent)


def link(key: bytes, form: Canonical) -> bytes:
    """The key of the history with this key and one more message."""
    return key if form.is_silent else blake2b(key + form.digest, digest_size=16).digest()


def _common_length(one: tuple[Any, ...], other: tuple[Any, ...]) -> int:
    """How many items at the beginning are equal."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:  # most calls only add messages
        return shorter
    return bisect_left(range(1, shorter + 1), True, key=lambda length: one[:length] != other[:length])
