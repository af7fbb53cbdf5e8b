"""Every chat template of the installed trl, in every situation: an exact extension that says what the template says,
or a fork with its cause and the template's own render."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from gymlink.align import Parsed, RolloutRecord
from gymlink.align.template import PROBE_TOOL, ChatTemplate
from gymlink.errors import AlignmentError
from gymlink.types import ForkCause, Generation

USER = {"role": "user", "content": "question"}
MORE = {"role": "user", "content": "another question"}
TEXT = "some plain answer"
RESULTS: Counter[str] = Counter()


@dataclass(frozen=True)
class Cell:
    name: str
    stop: str = "canonical"  # or "none" (cut by length) or "second"
    text: str = TEXT
    spelled: bool = False  # ids that would not come out of tokenizing the text
    calls: int = 0
    new: tuple[Any, ...] = (MORE,)


def results(count: int) -> tuple[Any, ...]:
    return tuple({"role": "tool", "tool_call_id": f"call{n:05}", "content": f"found {n}"} for n in range(count))


CELLS = [
    Cell("plain"),
    Cell("cut by length", stop="none"),
    Cell("empty", stop="none", text=""),
    Cell("empty, stopped", text=""),
    Cell("second stop", stop="second"),
    Cell("other ids", spelled=True),
    Cell("special text", new=({"role": "user", "content": "say <|im_end|> and </s> and <|endoftext|> please"},)),
    Cell("two users", new=(MORE, {"role": "user", "content": "and one more"})),
    Cell("no new message", new=()),
    Cell("tool result", calls=1, new=results(1)),
    Cell("tool results", calls=2, new=results(2)),
    Cell("tool result, then user", calls=1, new=(*results(1), MORE)),
    Cell("call cut by length", calls=1, stop="none", new=results(1)),
]


def calls(count: int) -> list[Any]:
    return [
        {"id": f"call{n:05}", "type": "function", "function": {"name": "probe_tool", "arguments": '{"query": "that"}'}}
        for n in range(count)
    ]


def completion(cell: Cell, chat: Any, tokenizer: Any, prompt: str) -> list[int]:
    opened = prompt.rfind("<think>") > prompt.rfind("</think>")
    text = f"thinking\n</think>\n\n{cell.text}" if opened and cell.text else cell.text
    ids = tokenizer.encode(text, add_special_tokens=False)
    if cell.spelled:
        ids = [token for letter in text for token in tokenizer.encode(letter, add_special_tokens=False)]
    if cell.stop == "second":
        ids.append(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    return ids


def canonical_stop(chat: Any, new: tuple[Any, ...]) -> list[int]:
    """What the policy learned to end a turn with: the first id that the template writes after it."""
    ids = chat.extend(
        [1], [], "length", new, [PROBE_TOOL], answered={"role": "assistant", "tool_calls": calls(len(new))}
    )
    return [ids[0]] if ids and ids[0] in chat.stop_token_ids else []


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_exact_or_forked(template: str, cell: Cell, tokenizer_of: Any, format_of: Any) -> None:
    tokenizer, chat = tokenizer_of(template), format_of(template)
    own = ChatTemplate(tokenizer)
    tools = [PROBE_TOOL] if cell.calls else []
    record = RolloutRecord("r", chat)
    first = record.plan([USER], tools)
    assert (first.parent, first.cause) == (None, None)
    prompt = tokenizer.decode(first.prompt_ids)
    ids = completion(cell, chat, tokenizer, prompt)
    if cell.stop == "canonical":
        ids += canonical_stop(chat, cell.new)
    answer = {"role": "assistant", "content": "" if cell.calls else cell.text}
    if cell.calls:
        answer["tool_calls"] = calls(cell.calls)
    reason = "length" if cell.stop == "none" else "stop"
    record.add(first, Generation(tuple(ids), (0.0,) * len(ids), reason), answer)

    messages = [USER, answer, *cell.new]
    try:
        expected = own.text(messages, tools)
    except AlignmentError:
        expected = None
    try:
        plan = record.plan(messages, tools)
    except AlignmentError:
        assert expected is None, "a fork must be possible wherever the template writes the conversation"
        RESULTS["refused by the template"] += 1
        return

    if plan.parent is None:
        RESULTS["forked"] += 1
        assert plan.cause is ForkCause.RETEMPLATED
        assert expected is not None
        assert plan.prompt_ids == tuple(tokenizer.encode(expected, add_special_tokens=False))
        return
    RESULTS["exact"] += 1
    held = (*first.prompt_ids, *ids)
    assert plan.prompt_ids[: len(held)] == held
    assert plan.cause is None
    check_new_part(cell, chat, tokenizer, expected, tokenizer.decode(plan.prompt_ids[len(held) :]))


def check_new_part(cell: Cell, chat: Any, tokenizer: Any, expected: str | None, added: str) -> None:
    """What follows the sampled ids is what the template writes there, no more and no less."""
    for message in cell.new:
        assert message["content"].strip() in added
    if expected is None:
        return  # the template refuses this whole, but its continuation was proven for the kind
    unclosed = chat._reasoning_end and tokenizer.decode(chat._reasoning_end)
    if unclosed and added.startswith(unclosed):
        added = added.removeprefix(unclosed)
    assert expected.endswith(added)
    if cell.stop == "none" and cell.text and not cell.calls:
        assert expected.endswith(cell.text + added), "a cut turn must be closed as the template closes it"
    closed = tokenizer.decode(canonical_stop(chat, cell.new))
    if cell.stop == "second" and closed not in ("", "<|endoftext|>"):
        # The second stop token closed the turn; only a marker that opens the next message is still to come (GLM).
        opens = chat._template.encode(closed)[0] in chat._openers
        assert added.startswith(closed) is opens
    if cell.stop == "canonical" and cell.text and not cell.calls:
        assert expected.endswith(cell.text + closed + added), "an end marker that was sampled must not be doubled"


def test_every_template_extends_at_a_user_turn(
    template_names: list[str], format_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = {name: format_of(name).report for name in template_names}
    kinds = Counter(kind for report in reports.values() for kind in report.extends)
    forks = Counter(kind for report in reports.values() for kind in report.forks)
    refused = Counter(kind for report in reports.values() for kind in report.refused)
    read = Counter("renderers" if format_of(name).name.startswith("renderers") else "own" for name in template_names)
    with capsys.disabled():
        print(f"\n{len(template_names)} templates; read by: {dict(read)}; cells: {dict(RESULTS)}")
        for kind in kinds:
            print(
                f"  {kind:26} exact {kinds[kind]:3}  forks {forks[kind]:3}  refused by the template {refused[kind]:3}"
            )
    assert kinds["user"] == kinds["user, with tools"] == len(template_names)
    assert not Parsed("").tool_calls
