"""Every chat template of the installed trl and every format of renderers, in every situation: an exact extension that
says what the template says, or a fork with its cause and the template's own render. Nothing else, and nothing is lost.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from chats import (
    CHATS,
    FORMATS,
    NAMES,
    UNBUILDABLE,
    Agent,
    Chat,
    Message,
    chat_of,
    check_conservation,
    held_by,
    make_tokenizer,
)
from gymlink.align import PromptPlan, load_format
from gymlink.align.known import known_names
from gymlink.align.template import PROBE_TOOL
from gymlink.errors import AlignmentError, ConfigError
from gymlink.types import FinishReason, ForkCause

pytestmark = pytest.mark.matrix

Messages = list[Message]
Outcome = Literal["exact", "forked", "refused"]

USER: Message = {"role": "user", "content": "question"}
MORE: Message = {"role": "user", "content": "another question"}
LAST: Message = {"role": "user", "content": "the last word"}
RULES: Message = {"role": "system", "content": "some rules"}
OTHER_TOOL = {"type": "function", "function": {**PROBE_TOOL["function"], "name": "other_tool"}}
SPELLED = "say <|im_end|> and </s> and <|endoftext|> and <|eot_id|> please"
RESULTS: Counter[tuple[str, Outcome]] = Counter()


# -- what the policy samples, and what becomes of it --------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """One sampled turn."""

    text: str = "some plain answer"
    reasoning: str | None = None
    calls: tuple[str, ...] = ()
    """The arguments of each call, as JSON text."""
    stop: Literal["own", "second", "none"] = "own"
    letters: bool = False
    """Sampled letter by letter: ids that tokenizing the text would not give."""
    ids: Callable[[Chat], Sequence[int]] | None = None
    """What is sampled instead."""

    @property
    def message(self) -> Message:
        message: Message = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [call(place, arguments) for place, arguments in enumerate(self.calls)]
        return message


def call(place: int, arguments: Any) -> Message:
    return {"id": f"call{place:05}", "type": "function", "function": {"name": "probe_tool", "arguments": arguments}}


def results(count: int, content: str = "found") -> tuple[Message, ...]:
    return tuple({"role": "tool", "tool_call_id": f"call{n:05}", "content": f"{content} {n}"} for n in range(count))


def as_it_is(messages: Messages) -> Messages:
    return messages


@dataclass(frozen=True)
class Cell:
    """One situation. The last call of it is looked at: what the policy said before, and what is new since."""

    name: str
    turns: tuple[tuple[Said, tuple[Message, ...]], ...] = ((Said(), (MORE,)),)
    opening: tuple[Message, ...] = (USER,)
    tools: tuple[Any, ...] = ()
    args: Mapping[str, Any] = field(default_factory=dict)
    rewrite: Callable[[Messages], Messages] = as_it_is
    """What the agent does to the history before it asks for the last time."""
    echo: Callable[[Messages], Messages] = as_it_is
    """What happens to it on the way back: nothing of it changes what was said."""
    last_tools: tuple[Any, ...] | None = None
    last_args: Mapping[str, Any] | None = None
    cause: ForkCause | None = None
    """Why it forks, unless the template writes the same text anyway. None where it has to extend."""
    parent: int | None = None
    """The turn that it extends, where it is not the last: what came after that one was rewritten."""


def turn(said: Said = Said(), *new: Message) -> tuple[tuple[Said, tuple[Message, ...]], ...]:
    return ((said, new or (MORE,)),)


def replaced(place: int, **changes: Any) -> Callable[[Messages], Messages]:
    def rewrite(messages: Messages) -> Messages:
        changed = list(messages)
        changed[place] = {**messages[place], **changes}
        return changed

    return rewrite


def without(*names: str) -> Callable[[Messages], Messages]:
    return lambda messages: [{key: message[key] for key in message.keys() - set(names)} for message in messages]


def inserted(place: int, *new: Message) -> Callable[[Messages], Messages]:
    return lambda messages: [*messages[:place], *new, *messages[place:]]


IDS = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")
CALL, OTHER = '{"query": "that"}', '{"query": "else"}'
MANY = ((Said(), (MORE,)), (Said("a second answer"), (LAST,)))
CALLED = ((Said("", calls=(CALL,)), results(1)), (Said(), (MORE,)))
RESUME = {"continue_final_message": True}
TOOLS = (PROBE_TOOL,)

CELLS = [
    # plain turns, and how they end
    Cell("plain"),
    Cell("plain turns", MANY),
    Cell("two users", turn(Said(), MORE, LAST)),
    Cell("no new message", ((Said(), ()),)),
    Cell("system", opening=(RULES, USER)),
    Cell("developer", opening=({**RULES, "role": "developer"}, USER)),
    Cell("system, later", turn(Said(), {"role": "system", "content": "new rules"}, MORE)),
    Cell("cut by length", turn(Said(stop="none"))),
    Cell("empty", turn(Said("", stop="none"))),
    Cell("empty, stopped", turn(Said(""))),
    Cell("empty, and absent", turn(Said("")), echo=lambda messages: [*messages[:1], *messages[2:]]),
    Cell("second stop", turn(Said(stop="second"))),
    # ids and text
    Cell("other ids", turn(Said(letters=True))),
    Cell("other ids, turns", ((Said(letters=True), (MORE,)), (Said("a second answer", letters=True), (LAST,)))),
    Cell("special text of the user", turn(Said(), {"role": "user", "content": SPELLED})),
    Cell("special text of a tool", turn(Said("", calls=(CALL,)), *results(1, SPELLED)), tools=TOOLS),
    Cell("special text, sampled", turn(Said(SPELLED, letters=True))),
    # reasoning
    Cell("reasoning", turn(Said(reasoning="a thought"))),
    Cell("reasoning, turns", ((Said(reasoning="a thought"), (MORE,)), (Said("more", "a second thought"), (LAST,)))),
    Cell("reasoning, dropped by the agent", turn(Said(reasoning="a thought")), echo=without("reasoning_content")),
    Cell("reasoning, cut", turn(Said("", reasoning="a thought", stop="none"))),
    Cell("reasoning, then a call", turn(Said("", "a thought", (CALL,)), *results(1)), tools=TOOLS),
    Cell(
        "reasoning, then a call, then a user",
        ((Said("", "a thought", (CALL,)), results(1)), (Said(reasoning="a second thought"), (MORE,))),
        tools=TOOLS,
    ),
    Cell("reasoning off", args={"enable_thinking": False}),
    Cell("reasoning off, later", last_args={"enable_thinking": False}, cause=ForkCause.TOOLS_CHANGED),
    Cell(
        "reasoning off, after a cut character",
        turn(Said("\ufffd", ids=lambda chat: chat.ids("\U0001f600")[:1], stop="none")),
        last_args={"enable_thinking": False},
        cause=ForkCause.TOOLS_CHANGED,
    ),
    Cell(
        "reasoning edited",
        turn(Said(reasoning="a thought")),
        rewrite=replaced(1, reasoning_content="another"),
        cause=ForkCause.EDITED,
    ),
    # tools
    Cell("call", turn(Said("", calls=(CALL,)), *results(1)), tools=TOOLS),
    Cell("call, after text", turn(Said("first a look", calls=(CALL,)), *results(1)), tools=TOOLS),
    Cell("calls", turn(Said("", calls=(CALL, OTHER)), *results(2)), tools=TOOLS),
    Cell("calls, three", turn(Said("", calls=(CALL, OTHER, CALL)), *results(3)), tools=TOOLS),
    Cell("result without a call", turn(Said(), *results(1)), tools=TOOLS),
    Cell("call, then user", turn(Said("", calls=(CALL,)), *results(1), MORE), tools=TOOLS),
    Cell("call cut by length", turn(Said("", calls=(CALL,), stop="none"), *results(1)), tools=TOOLS),
    Cell("calls, turns", ((Said("", calls=(CALL,)), results(1)), (Said("", calls=(OTHER,)), results(1))), tools=TOOLS),
    Cell(
        "call in another spelling",
        turn(Said("", calls=('{"query":"that",   "n": 1}',)), *results(1)),
        tools=TOOLS,
        rewrite=replaced(1, tool_calls=[call(0, '{"n":1,"query":"that"}')]),
    ),
    Cell(
        "call as an object",
        turn(Said("", calls=('{"query":"that",   "n": 1}',)), *results(1)),
        tools=TOOLS,
        rewrite=replaced(1, tool_calls=[call(0, {"n": 1, "query": "that"})]),
    ),
    Cell("tools added", last_tools=TOOLS, cause=ForkCause.TOOLS_CHANGED),
    Cell("tools removed", CALLED, tools=TOOLS, last_tools=(), cause=ForkCause.TOOLS_CHANGED),
    Cell("tools changed", CALLED, tools=TOOLS, last_tools=(OTHER_TOOL,), cause=ForkCause.TOOLS_CHANGED),
    # what agents do to a history
    Cell("user edited", rewrite=replaced(0, content="changed"), cause=ForkCause.EDITED),
    Cell("answer edited", rewrite=replaced(1, content="changed"), cause=ForkCause.EDITED),
    Cell("earlier answer edited", MANY, rewrite=replaced(1, content="changed"), cause=ForkCause.EDITED),
    Cell("system edited", opening=(RULES, USER), rewrite=replaced(0, content="changed"), cause=ForkCause.EDITED),
    Cell("system added", rewrite=inserted(0, RULES), cause=ForkCause.EDITED),
    Cell(
        "call edited",
        turn(Said("", calls=(CALL,)), *results(1)),
        tools=TOOLS,
        rewrite=replaced(1, tool_calls=[call(0, OTHER)]),
        cause=ForkCause.EDITED,
    ),
    Cell("result edited", CALLED, tools=TOOLS, rewrite=replaced(2, content="changed"), parent=0),
    Cell("later answer edited", MANY, rewrite=replaced(3, content="changed"), parent=0),
    Cell(
        "compacted",
        MANY,
        rewrite=lambda _: [{"role": "user", "content": "what was said, in short"}],
        cause=ForkCause.COMPACTED,
    ),
    Cell("restarted", rewrite=lambda messages: messages[:1], cause=ForkCause.RESTARTED),
    Cell("injected", rewrite=inserted(3, {"role": "assistant", "content": "never sampled"}, LAST)),
    Cell(
        "injected, with the ids of another",
        rewrite=lambda messages: [*messages, {**messages[1], "content": "never sampled"}, LAST],
    ),
    Cell("injected at once", rewrite=inserted(2, {"role": "assistant", "content": "never sampled"})),
    # a message that is to be continued
    Cell("prefilled", turn(Said(), MORE, {"role": "assistant", "content": "Well, it"}), last_args=RESUME),
    Cell(
        "prefilled from the start",
        opening=(USER, {"role": "assistant", "content": "Well, it"}),
        args=RESUME,
        last_args={},
    ),
    Cell("prefilled with what was cut", ((Said(stop="none"), ()),), last_args=RESUME),
    # ids on messages
    Cell("ids missing", MANY, echo=without(*IDS)),
    Cell("ids null", echo=replaced(1, **dict.fromkeys(IDS))),
    Cell("ids as strings", echo=replaced(1, prompt_token_ids=["1"], generation_token_ids=["x", "2"])),
    Cell("ids of another rollout", echo=replaced(1, prompt_token_ids=[1, 2], generation_token_ids=[3])),
    Cell(
        "message of another rollout",
        rewrite=replaced(1, content="elsewhere", generation_token_ids=[3]),
        cause=ForkCause.FOREIGN_IDS,
    ),
]


# -- what is known to fork, though the messages agree -------------------------------------------------------------

# Writes a second round of tool results otherwise than the first.
DEEPSEEK = ("deepseek_r1_distill", "deepseek_r1_distill_training", "deepseekv3", "deepseekv3_training")
GEMMA4 = ("diffusion_gemma", "diffusion_gemma_training", "gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5")
GEMMA4 += ("renderers:gemma4",)  # moves the text before a call behind its result
GPTOSS = ("gptoss", "gptoss_training")  # writes one call of a message, whose results are of one call
HOISTS = ("cohere2", "cohere2_training", *DEEPSEEK, "renderers:hy3")  # every system message to the front
FORKS: Mapping[str, tuple[str, ...]] = {
    "no new message": ("renderers:hy3",),  # leaves a last answer open
    "system, later": HOISTS,
    "call, after text": GEMMA4,
    "calls": GPTOSS,
    "calls, three": GPTOSS,
    "result without a call": ("glm4moe_training", "muse_glimmer", "muse_glimmer_training", "renderers:inkling"),
    "injected at once": ("diffusion_gemma", "diffusion_gemma_training", "gemma4_v5", "renderers:gemma4"),  # one turn
}


# -- playing a cell -----------------------------------------------------------------------------------------------


CLOSED_REASONING = re.compile(r"\A\s*</think[^>]*>\s*")


class RefusedError(Exception):
    """The template itself does not write this conversation."""


def ask(agent: Agent, messages: Messages, tools: Any, args: Any) -> PromptPlan:
    try:
        return agent.record.plan(messages, tools, template_args=args)
    except AlignmentError as error:
        assert whole(agent.chat, messages, tools, args) is None, "a fork must be possible wherever it can be written"
        raise RefusedError from error


def whole(chat: Chat, messages: Messages, tools: Any, args: Any) -> str | None:
    """What the template writes for the whole conversation; None where it refuses."""
    try:
        return chat.text(messages, tools, **args)
    except AlignmentError:
        return None


def own_stop(chat: Chat, tools: Any) -> str:
    """What the policy learned to end a turn with: what the template writes after one, up to a stop token."""
    text = whole(chat, [USER, {"role": "assistant", "content": "zzqq"}, MORE], tools, {}) or ""
    ending = chat.ids(text.partition("zzqq")[2])[:4]
    stops = [place for place, token in enumerate(ending) if token in chat.format.stop_token_ids]
    return chat.tokenizer.decode(ending[: stops[0] + 1]) if stops else ""


def is_opener(chat: Chat, stop: str) -> bool:
    """Whether the token that ends a turn is the one that begins the next (GLM)."""
    begun = chat.ids(chat.text([USER]).partition("question")[0])
    control = [token for token in begun if token in chat.control]
    return bool(stop) and control[-1:] == chat.ids(stop)


def sampled(chat: Chat, said: Said, prompt: str, stop: str) -> list[int]:
    if said.ids is not None:
        return list(said.ids(chat))
    text = called(chat, said, prompt, stop) if said.calls else said.text
    opened = prompt.rfind("<think>") > prompt.rfind("</think>")
    if said.reasoning:
        text = ("" if opened else "<think>\n") + said.reasoning + (f"\n</think>\n\n{text}" if text else "")
    elif opened and text:
        text = f"\n</think>\n\n{text}"
    pieces = list(text) if said.letters else [text]
    ending = {"own": stop, "second": "<|endoftext|>", "none": ""}[said.stop]
    return [token for piece in (*pieces, ending) if piece for token in chat.ids(piece)]


def called(chat: Chat, said: Said, prompt: str, stop: str) -> str:
    """The text of a message with calls as the template writes it, or something like it where it writes it elsewhere."""
    found = results(len(said.calls))
    text = whole(chat, [USER, {**said.message, "reasoning_content": None}, *found], TOOLS, {}) or ""
    _, known, rest = text.rpartition(prompt[-20:])
    text = rest.partition(stop)[0] if stop else ""
    if known and text != rest and "found" not in text:
        return text
    return said.text + "".join(f"\n<tool_call>{arguments}</tool_call>" for arguments in said.calls)


def play(agent: Agent, cell: Cell) -> Messages:
    """Everything before the last call; the messages of that call, before they are rewritten."""
    messages: Messages = list(cell.opening)
    stop = own_stop(agent.chat, cell.tools)
    for said, new in cell.turns:
        plan = ask(agent, messages, cell.tools, cell.args)
        prompt = agent.chat.tokenizer.decode(plan.prompt_ids)
        ids = sampled(agent.chat, said, prompt, stop)
        finish: FinishReason = "length" if said.stop == "none" else "stop"
        messages += [agent.sample(plan, ids, said.message, finish), *new]
    return messages


# -- the checks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
@pytest.mark.parametrize("name", CHATS)
def test_exact_or_forked(name: str, cell: Cell) -> None:
    for reasoning in ("keep", "drop"):
        agent = Agent(chat_of(name), reasoning)
        try:
            outcome = check(agent, cell, reasoning)
        except RefusedError:
            outcome = "refused"
        RESULTS[reasoning, outcome] += 1


def check(agent: Agent, cell: Cell, reasoning: str) -> Outcome:
    messages = cell.rewrite(play(agent, cell))
    tools = cell.tools if cell.last_tools is None else cell.last_tools
    args = cell.args if cell.last_args is None else cell.last_args
    written = whole(agent.chat, messages, tools, args)
    plan = ask(agent, cell.echo(messages), tools, args)
    cause = expected_cause(agent, cell, reasoning, written)
    assert plan.cause is cause
    if cause is None:
        check_extension(agent, cell, plan, messages, written, resumed=bool(args.get("continue_final_message")))
    else:
        assert plan.parent is None
        assert agent.chat.tokenizer.decode(plan.prompt_ids) == written
        check_shown(messages, written or "")
    agent.sample(plan, agent.chat.ids("the end"), {"role": "assistant", "content": "the end"})
    check_conservation(agent.record.turns)
    return "exact" if cause is None else "forked"


def expected_cause(agent: Agent, cell: Cell, reasoning: str, written: str | None) -> ForkCause | None:
    """Why this has to fork, from what the template writes and from what is known of it."""
    chat, held = agent.chat, agent.chat.tokenizer.decode(held_by(agent.record.turns[-1]))
    said, new = cell.turns[-1 if cell.parent is None else cell.parent]
    if written is not None and written.startswith(held):
        return ForkCause.RETOKENIZED if cell.cause and said.ids else None  # all that was held is there
    if cell.cause is not None:
        return cell.cause
    thoughts = [said.reasoning for said, _ in cell.turns if said.reasoning and said.reasoning in held]
    stripped = written is not None and any(thought not in written for thought in thoughts)
    if reasoning == "drop" and stripped and any(message["role"] == "user" for message in new):
        return ForkCause.REASONING_STRIPPED
    if chat.name in FORKS.get(cell.name, ()) or (chat.name in DEEPSEEK and new and new[0]["role"] == "tool"):
        return ForkCause.REASONING_STRIPPED if stripped else ForkCause.RETEMPLATED
    return None


def check_extension(
    agent: Agent, cell: Cell, plan: PromptPlan, messages: Messages, written: str | None, *, resumed: bool
) -> None:
    """The new part says every new message, and is what the template writes after the turn, no more and no less."""
    assert plan.parent == (len(cell.turns) - 1 if cell.parent is None else cell.parent)
    added = agent.added(plan)
    said = cell.turns[plan.parent][0]
    place = max(at for at, message in enumerate(messages) if is_said(said, message))
    check_shown(messages[place + 1 :], added)
    if resumed and place == len(messages) - 1:
        assert added == ""
    if written is None:
        return  # the template refuses this whole, but its continuation was proven for the kind
    if said.stop == "none":
        added = CLOSED_REASONING.sub("", added)
    assert written.endswith(added)
    before = written.removesuffix(added)
    if said.text and not said.calls and said.ids is None and not resumed:
        check_end(agent.chat, said, before.rpartition(said.text)[2], own_stop(agent.chat, cell.tools))


def check_end(chat: Chat, said: Said, ending: str, stop: str) -> None:
    """Of the turn's end marker, all that was sampled, and what that made needless, is not written again."""
    if said.stop == "none":
        assert ending == ""
    elif is_opener(chat, stop):
        assert ending in ("", stop if said.stop == "own" else "")
    elif said.stop == "own":
        assert ending == stop
    else:
        assert ending.startswith(stop)
        assert set(chat.ids(ending.strip())) <= chat.control


def is_said(said: Said, message: Message) -> bool:
    return message["role"] == "assistant" and (message["content"] or "") == said.text


def check_shown(messages: Messages, text: str) -> None:
    """Whatever the environment or the agent wrote is there."""
    for message in messages:
        if message["role"] != "assistant" or not message.get("generation_token_ids"):
            assert str(message.get("content") or "").strip() in text


# -- two of equal text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHATS)
def test_two_rollouts_with_the_same_text_and_other_ids(name: str) -> None:
    chat = chat_of(name)
    agents = [Agent(chat), Agent(chat)]
    histories = [
        play(agent, Cell("", turn(Said(letters=letters)))) for agent, letters in zip(agents, (False, True), strict=True)
    ]
    for agent, history in zip(agents, histories[::-1], strict=True):  # each is sent the ids of the other
        plan = agent.record.plan(history)
        assert plan.parent == 0
        assert "another question" in agent.added(plan)
    assert held_by(agents[0].record.turns[0]) != held_by(agents[1].record.turns[0])


@pytest.mark.parametrize("name", CHATS)
def test_two_turns_of_equal_text_are_told_apart_by_their_ids(name: str) -> None:
    agent = Agent(chat_of(name))
    echoes = []
    for plan, letters in [(agent.record.plan([USER]), letters) for letters in (True, False)]:
        ids = sampled(agent.chat, Said(letters=letters), "", "")
        echoes.append(agent.sample(plan, ids, Said().message, "length"))
    for place, echo in enumerate(echoes):
        assert agent.record.plan([USER, echo, MORE]).parent == place
    assert agent.record.plan([USER, Said().message, MORE]).parent == 1


# -- what there is ------------------------------------------------------------------------------------------------


def test_every_format_of_renderers_is_here_or_says_why_not() -> None:
    assert sorted([*FORMATS, *UNBUILDABLE]) == sorted(known_names())
    for name, reason in UNBUILDABLE.items():
        with pytest.raises(ConfigError, match=reason):
            load_format(make_tokenizer("gptoss"), name=name)


def test_what_the_templates_write_is_what_a_format_writes() -> None:
    """The renders of a format of renderers are proven against a template wherever the two are the same."""
    proven = {chat_of(name).format.name for name in NAMES} - {"template"}
    assert proven >= {f"renderers:{name}" for name in ("qwen3", "qwen3.5", "qwen3.8", "qwen3-vl", "nemotron-3")}


def test_every_template_extends_at_a_user_turn(capsys: pytest.CaptureFixture[str]) -> None:
    reports = {name: chat_of(name).format.report for name in CHATS}
    kinds = Counter(kind for report in reports.values() for kind in report.extends)
    forks = Counter(kind for report in reports.values() for kind in report.forks)
    refused = Counter(kind for report in reports.values() for kind in report.refused)
    with capsys.disabled():
        print(f"\n{len(NAMES)} templates and {len(FORMATS)} formats; cells: {dict(RESULTS)}")
        for kind in kinds:
            print(f"  {kind:26} exact {kinds[kind]:3}  forks {forks[kind]:3}  refused {refused[kind]:3}")
    assert kinds["user"] == kinds["user, with tools"] == len(CHATS)
