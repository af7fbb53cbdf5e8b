"""Continue a conversation with the template's own words, without touching its history.

What a template writes after an assistant message is found by rendering `[user, assistant = SENTINEL, new messages...]`
and keeping the text after the sentinel: it begins at the turn's real end marker, and its cost does not depend on the
history. Each kind of continuation is proven on probe conversations before it is first used: there the text must be how
the whole conversation's render ends, token by token, and nothing before it may depend on the new messages. A kind that
cannot be proven is not used.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final, TypeVar

import orjson

from gymlink.align.base import NO_ARGS, FormatReport, Ids, Parsed
from gymlink.align.canonical import digest, split_reasoning, tool_calls_of
from gymlink.align.parsing import Parser, safe_decode, safe_parse
from gymlink.align.template import PROBE_TOOL, Template, probe_call
from gymlink.errors import AlignmentError
from gymlink.types import FinishReason, Message, Tool

MAX_PROOFS: Final = 1024
"""Proofs that are kept: more than any run needs, unless template arguments differ from row to row."""

_T = TypeVar("_T")
_CLOSING_TAG = re.compile(r"</(think[^<>]*)>")
_ASKED: Final[Message] = {"role": "user", "content": "question"}
_RULES: Final[Message] = {"role": "system", "content": "some rules"}
_ANSWERED: Final[Message] = {"role": "assistant", "content": "an answer"}
_CALLS, _TEXT_AND_CALLS, _ANY = "calls", "text and calls", ""
_KINDS: Final[Mapping[str, tuple[tuple[str, ...], str, bool]]] = {
    "user": (("user",), _ANY, False),
    "user, with tools": (("user",), _ANY, True),
    "tool result": (("tool",), _CALLS, True),
    "tool result, after text": (("tool",), _TEXT_AND_CALLS, True),
    "tool results": (("tool", "tool"), _CALLS, True),
}


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a continuation's form depends on. One proof holds for all messages of a shape."""

    roles: tuple[str, ...]
    answer: str
    """For tool results, the message with the calls: "calls", "text and calls", or "" where it is not known."""
    tools: bool
    args: bytes


@dataclass(frozen=True, slots=True)
class _Proof:
    """How the text after a sampled turn is found."""

    after_call: bool
    """The sentinel stands in a tool call's argument (templates that look back at the call), else in the content."""
    call_end: str
    """What the template writes between that argument and the turn's end marker."""
    end_marker: Ids
    """What closes the turn. Empty where only the next role's marker does (GLM)."""
    goes_on: bool
    """The new messages go on in the same turn (Gemma joins answers): nothing continues one that sampling closed."""


class TemplateFormat:
    """The format of any tokenizer with a chat template: rendered by the template, continued by its own suffix."""

    def __init__(self, template: Template, parser: Parser) -> None:
        self.name = parser.name
        self.encoder = template.encoder
        self._template = template
        self._parser = parser
        self._sentinel = "Zq" + secrets.token_hex(12)
        self._proofs: dict[_Shape, _Proof | None] = {}
        self._reasons: dict[_Shape, str] = {}
        self._stops: dict[int, None] = dict.fromkeys(parser.stop_token_ids)
        eos = template.tokenizer.eos_token_id
        self._stops.update(dict.fromkeys([eos] if isinstance(eos, int) else eos or []))
        self.report = self._prove_usual_kinds()
        self._reasoning_end = self._find_reasoning_end()

    @property
    def stop_token_ids(self) -> Ids:
        """The tokenizer's eos token and every marker that the template was seen to end a sampled turn with."""
        return tuple(self._stops)

    @property
    def writes_tools(self) -> bool:
        """See `ChatFormat.writes_tools`."""
        return self.report.writes_tools

    def encode(self, text: str) -> Ids:
        """See `ChatFormat.encode`."""
        return tuple(self._template.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """See `ChatFormat.decode`."""
        return safe_decode(self._template.decode, ids)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, template_args: Mapping[str, Any] = NO_ARGS
    ) -> Ids:
        """See `ChatFormat.render`."""
        return self._template.ids(messages, tools, template_args)

    def extend(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        finish_reason: FinishReason,
        new_messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        template_args: Mapping[str, Any] = NO_ARGS,
        answered: Message | None = None,
    ) -> Ids | None:
        """See `ChatFormat.extend`. The cost depends on the new messages, not on the history."""
        ended = self._ended(completion_ids, finish_reason)
        if not new_messages and template_args.get("continue_final_message"):
            return None if ended else ()
        shape = _shape(new_messages, answered, tools, template_args)
        proof = self._proof(shape, template_args)
        if proof is None:
            return None
        text = self._after_turn(proof, new_messages, tools, template_args, answered)
        if text is None:
            return None
        if ended and proof.goes_on:
            return None
        ids = self._template.encode(text)
        sampled = _sampled_part(completion_ids, ids, proof.end_marker, ended=ended)
        unclosed = () if ended else self._close_reasoning(prompt_ids, completion_ids)
        return (*unclosed, *ids[sampled:])

    def parse(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        tools: Sequence[Tool] = (),
        *,
        template_args: Mapping[str, Any] = NO_ARGS,  # noqa: ARG002 - what the arguments opened stands in the prompt
    ) -> Parsed:
        """See `ChatFormat.parse`."""
        return safe_parse(self._parser, self._template.decode, prompt_ids, completion_ids, tools)

    # -- the text after a turn -----------------------------------------------------------------------------------

    def _after_turn(
        self,
        proof: _Proof,
        new_messages: Sequence[Message],
        tools: Sequence[Tool],
        template_args: Mapping[str, Any],
        answered: Message | None,
    ) -> str | None:
        answer = self._stand_in(new_messages, answered) if proof.after_call else self._stand_in_content()
        if answer is None:
            return None
        text = self._after_sentinel([_ASKED, answer, *new_messages], tools, template_args)
        if text is None or not text.startswith(proof.call_end):
            return None
        return text[len(proof.call_end) :]

    def _after_sentinel(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        template_args: Mapping[str, Any],
        *,
        generate: bool = True,
    ) -> str | None:
        try:
            text = self._template.text(messages, tools, template_args, generate=generate, answers=False)
        except AlignmentError:
            return None
        before, found, after = text.partition(self._sentinel)
        return after if found and self._sentinel not in before + after else None

    def _stand_in_content(self) -> Message:
        return {"role": "assistant", "content": self._sentinel}

    def _stand_in(self, new_messages: Sequence[Message], answered: Message | None) -> Message | None:
        """An assistant message that makes the calls whose results follow, the sentinel in the last one."""
        calls = [
            (str(call.get("id") or ""), str((call.get("function") or call).get("name") or ""))
            for call in tool_calls_of(answered or {})
        ] or [
            (str(message.get("tool_call_id") or ""), str(message.get("name") or ""))
            for message in new_messages
            if message.get("role") == "tool"
        ]
        if not calls or not all(name for _, name in calls):
            return None
        made = [
            {"id": index, "type": "function", "function": {"name": name, "arguments": '{"query": "x"}'}}
            for index, name in calls
        ]
        made[-1]["function"] = {"name": calls[-1][1], "arguments": orjson.dumps({"query": self._sentinel}).decode()}
        return {"role": "assistant", "content": "", "tool_calls": made}

    # -- closing a turn ------------------------------------------------------------------------------------------

    def _ended(self, completion_ids: Sequence[int], finish_reason: FinishReason) -> bool:
        """Whether sampling closed the turn itself. An engine may stop at ids that the template never writes."""
        if not completion_ids:
            return False
        last = completion_ids[-1]
        return last in self._stops or (finish_reason == "stop" and last in self._template.special_ids)

    def _close_reasoning(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> Ids:
        """A turn cut inside its reasoning is closed as the template writes reasoning without an answer."""
        if self._reasoning_end is None:
            return ()
        opened, closed, ids = self._reasoning_end
        text = self._template.opening(prompt_ids) + self.decode(completion_ids)
        return ids if text.rfind(opened) > text.rfind(closed) else ()

    def _find_reasoning_end(self) -> tuple[str, str, Ids] | None:
        """The tags around reasoning, and the ids between it and the answer; None where no tags are."""
        thought, said = self._sentinel + "r", self._sentinel + "c"
        message = {"role": "assistant", "content": said, "reasoning_content": thought}
        try:
            text = self._template.text([_ASKED, message], generate=False)
        except AlignmentError:
            return None
        end, found, _ = text.partition(thought)[2].partition(said)
        tag = _CLOSING_TAG.fullmatch(end.strip())
        return (f"<{tag[1]}>", f"</{tag[1]}>", self.encode(end)) if found and tag else None

    # -- proofs --------------------------------------------------------------------------------------------------

    def _prove_usual_kinds(self) -> FormatReport:
        extends, forks, refused = [], [], {}
        for kind, (roles, answer, with_tools) in _KINDS.items():
            shape = _Shape(roles, answer, with_tools, digest({}))
            if self._proof(shape, NO_ARGS) is not None:
                extends.append(kind)
            elif shape in self._reasons:
                refused[kind] = self._reasons[shape]
            else:
                forks.append(kind)
        return FormatReport(tuple(extends), tuple(forks), refused, self._template.writes_tools)

    def _proof(self, shape: _Shape, template_args: Mapping[str, Any]) -> _Proof | None:
        if shape not in self._proofs:
            proof = self._prove(shape, template_args, after_call=False)
            if proof is None and shape.roles and shape.roles[0].startswith("tool"):
                proof = self._prove(shape, template_args, after_call=True)
            if len(self._proofs) >= MAX_PROOFS:  # template arguments that differ in every row
                self._proofs.clear()
                self._reasons.clear()
            self._proofs[shape] = proof
            return proof  # another thread may clear them meanwhile
        return self._proofs.get(shape)

    def _prove(self, shape: _Shape, template_args: Mapping[str, Any], *, after_call: bool) -> _Proof | None:
        tools = [PROBE_TOOL] if shape.tools else []
        proof = self._candidate(shape, tools, template_args, after_call=after_call)
        if proof is None:
            return None
        proven = False
        for base in _probe_histories(with_tools=shape.tools):
            for answer in _probe_answers(shape):
                heads = []
                for word in ("one", "two"):
                    new = _probe_messages(shape.roles, word)
                    try:
                        whole, ids = self._template.written([*base, answer, *new], tools, template_args, answers=False)
                    except AlignmentError as error:
                        self._reasons[shape] = str(error)
                        break
                    suffix = self._after_turn(proof, new, tools, template_args, answer)
                    if suffix is None or not self._continues(whole, ids, suffix, new):
                        return None
                    heads.append(whole[: len(whole) - len(suffix)])
                else:
                    if heads[0] != heads[1]:
                        return None
                    proven = True
        if not proven:
            return None
        self._reasons.pop(shape, None)
        return proof

    def _continues(self, whole: str, ids: Ids, suffix: str, new: Sequence[Message]) -> bool:
        """Whether the whole render ends with `suffix`, in text and in ids, and the suffix says every new message."""
        if not suffix or not whole.endswith(suffix) or not all(word in suffix for word in _words(new)):
            return False
        encode, decode = self._template.encode, self._template.decode
        added = encode(suffix)
        if ids[len(ids) - len(added) :] == tuple(added):
            return True
        # Without a control token at the seam, merges may cross it: then the text must survive, which is what is sampled
        # after. Sampled text has no canonical ids there either.
        head = encode(whole[: len(whole) - len(suffix)])
        return decode([*head, *added]) == decode(ids)

    def _candidate(
        self, shape: _Shape, tools: Sequence[Tool], template_args: Mapping[str, Any], *, after_call: bool
    ) -> _Proof | None:
        """Finds the end marker: what the template writes after the turn whether or not anything follows."""
        new, asked = _probe_messages(shape.roles, "one"), next(_probe_answers(shape))
        try:
            self._template.text([_ASKED, asked, *new], tools, template_args, answers=False)
        except AlignmentError as error:
            self._reasons[shape] = str(error)
        answer = self._stand_in(new, asked) if after_call else self._stand_in_content()
        if answer is None:
            return None
        followed = self._after_sentinel([_ASKED, answer, *new], tools, template_args)
        resting = {key: value for key, value in template_args.items() if key != "continue_final_message"}
        final = self._after_sentinel([_ASKED, answer], tools, resting, generate=False) or ""
        if followed is None:
            return None
        call_end = ""
        if after_call:
            shared = "".join(_shared(followed, final))
            ends = max((shared.rfind(token) for token in self._special_texts()), default=-1)
            if ends < 0:
                return None
            call_end = shared[:ends]
        prompted, *others = (
            (self._after_sentinel([_ASKED, answer, *next_], tools, resting) or "").removeprefix(call_end)
            for next_ in ([], [_ASKED], [_RULES], [_ANSWERED])
        )
        if prompted:  # else that answer is left open, and only another one shows how it ends
            others[-1] = prompted
        followed, final = followed[len(call_end) :], final[len(call_end) :]
        joins = shape.roles[:1] == ("assistant",) and self._begins_special(final) and not self._begins_special(followed)
        return _Proof(after_call, call_end, self._end_marker(followed, final, others), joins)

    def _end_marker(self, followed: str, final: str, others: Sequence[str]) -> Ids:
        """The ids that close a turn, whoever speaks next and also when nobody does; notes what sampling may stop at.

        Where the turn ends with the next role's own marker (GLM), there are none.
        """
        special, encode = self._template.special_ids, self._template.encode
        next_ids, last_ids = encode(followed), encode(final)
        whoever = next_ids
        for other in filter(None, others):
            whoever = _shared(whoever, encode(other))
        places = [place for place, token in enumerate(whoever) if token in special]
        if not last_ids:  # the last turn is left open, so only the first token is known to close an earlier one
            closing = places[0] + 1 if places else 0
        else:
            both = len(_shared(whoever, last_ids))
            closing = max((place + 1 for place in places if place < both), default=0)
            if not closing and places[:1] == [0] and last_ids[0] in special:
                closing = 1  # the last turn is closed by another token than earlier ones (gpt-oss)
        marker = tuple(next_ids[:closing])
        ends = [marker[-1]] if marker else next_ids[:1]
        if marker and marker[-1] not in last_ids:
            ends += last_ids[:1]
        self._stops.update(dict.fromkeys(token for token in ends if token in special))
        return marker

    def _begins_special(self, text: str) -> bool:
        return any(token in self._template.special_ids for token in self._template.encode(text)[:1])

    def _special_texts(self) -> list[str]:
        return [text for text in (self._template.decode([token]) for token in self._template.special_ids) if text]


def _shared(one: Sequence[_T], other: Sequence[_T]) -> list[_T]:
    """The longest common start."""
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def _sampled_part(completion: Sequence[int], ids: Sequence[int], marker: Ids, *, ended: bool) -> int:
    """How many of the leading `ids` stand in the completion already, or are made needless by how it ended."""
    if not completion:
        return 0
    last = completion[-1]
    if last in marker:
        return len(marker) - marker[::-1].index(last)
    if not ended:
        return 0
    if marker:
        return len(marker)  # a second stop token closed the turn
    return int(bool(ids) and ids[0] == last)  # the next role's own marker was sampled as the stop


def _shape(
    messages: Sequence[Message], answered: Message | None, tools: Sequence[Tool], template_args: Mapping[str, Any]
) -> _Shape:
    answer = _ANY
    if answered and messages and messages[0].get("role") == "tool" and tool_calls_of(answered):
        answer = _TEXT_AND_CALLS if split_reasoning(answered)[0] else _CALLS
    return _Shape(tuple(map(_kind, messages)), answer, bool(tools), digest(dict(template_args)))


def _kind(message: Message) -> str:
    role = str(message.get("role") or "")
    if role == "tool" and message.get("name"):
        return "tool:named"
    if role == "assistant" and tool_calls_of(message):
        return "assistant:calls"
    return role


# -- probe conversations -----------------------------------------------------------------------------------------


def _probe_messages(kinds: Sequence[str], word: str) -> list[Message]:
    messages: list[Message] = []
    for place, kind in enumerate(kinds):
        role, _, detail = kind.partition(":")
        message: dict[str, Any] = {"role": role, "content": f"{role} {word} {place}"}
        if role == "tool":
            message["tool_call_id"] = f"call{place:05}"
        if detail == "named":
            message["name"] = "probe_tool"
        if detail == "calls":
            message["tool_calls"] = [probe_call(f"call{place + 1:05}", f"call {word} {place}")]
        messages.append(message)
    return messages


def _words(messages: Sequence[Message]) -> Iterator[str]:
    """What has to be read of these probe messages."""
    for message in messages:
        yield str(message["content"])
        for call in tool_calls_of(message):
            yield str(orjson.loads(call["function"]["arguments"])["query"])


def _probe_answers(shape: _Shape) -> Iterator[Message]:
    results = len(list(takewhile(lambda kind: kind.startswith("tool"), shape.roles)))
    if not results:
        yield _ANSWERED
        yield {"role": "assistant", "content": "an answer", "reasoning_content": "a thought"}
        return
    calls = [probe_call(f"call{place:05}", "this") for place in range(results)]
    for text in {_CALLS: ("",), _TEXT_AND_CALLS: ("first a look",)}.get(shape.answer, ("", "first a look")):
        yield {"role": "assistant", "content": text, "tool_calls": calls}
        yield {"role": "assistant", "content": text, "reasoning_content": "a thought", "tool_calls": calls}


def _probe_histories(*, with_tools: bool) -> Iterator[list[Message]]:
    answer: Message = {"role": "assistant", "content": "an earlier answer"}
    yield [_ASKED]
    yield [_RULES, _ASKED]
    yield [_ASKED, answer, {"role": "user", "content": "another question"}]
    if with_tools:
        called: Message = {"role": "assistant", "content": "", "tool_calls": [probe_call("call90000", "that")]}
        result: Message = {"role": "tool", "tool_call_id": "call90000", "name": "probe_tool", "content": "found"}
        yield [_ASKED, called, result, answer, {"role": "user", "content": "another question"}]
