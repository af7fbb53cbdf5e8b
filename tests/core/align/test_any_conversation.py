"""Any conversation that hypothesis can think of, in any template or format, with any agent: what a record promises of
each prompt and of the segments at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chats import CHATS, Agent, Chat, Message, chat_of, check_conservation, held_by
from gymlink.align import PromptPlan, canonical
from gymlink.align.template import PROBE_TOOL
from gymlink.errors import AlignmentError

SPELLINGS = ["<|im_end|>", "a</s>", "<think>", "</think>x", "<|eot_id|>", "<tool_call>{", "<|im_start|>user\n", " "]
SPELLINGS += ["\n", "\ufffd", "\U0001f600", "[/INST]", "<|user|>", "{{ x }}", "<｜User｜>", "<turn|>", "null", "{}"]  # noqa: RUF001
TEXT = st.text(max_size=12) | st.lists(st.sampled_from(SPELLINGS), max_size=3).map("".join)
IDS = st.lists(st.integers(0, 700), max_size=6)
CALLED = '\n<tool_call>\n{"name": "probe_tool", "arguments": {"query":"x",  "n": 1}}\n</tool_call>'


# -- what an agent does before it asks again ----------------------------------------------------------------------


@dataclass
class State:
    """What the agent sends next."""

    messages: list[Message]
    tools: list[Any] = field(default_factory=list)
    args: dict[str, Any] = field(default_factory=dict)

    def change(self, place: int, **changes: Any) -> None:
        place %= len(self.messages)
        self.messages[place] = {**self.messages[place], **changes}

    def last_answer(self) -> int:
        return max((at for at, message in enumerate(self.messages) if message["role"] == "assistant"), default=0)


def drop(*names: str) -> Callable[[State, str, int], None]:
    def act(state: State, text: str, number: int) -> None:
        kept = [{key: value for key, value in message.items() if key not in names} for message in state.messages]
        state.messages[:] = kept

    return act


def respell(state: State, text: str, number: int) -> None:
    """The same history in other words: parts, None for nothing, arguments as an object or with other spaces."""
    for place, message in enumerate(state.messages):
        calls = [
            {**call, "function": {**call["function"], "arguments": spelled(call["function"]["arguments"], number)}}
            for call in message.get("tool_calls") or ()
        ]
        said = message.get("content") or None
        content = [{"type": "text", "text": said}] if said and number % 2 and isinstance(said, str) else said
        state.messages[place] = {**message, "content": content, **({"tool_calls": calls} if calls else {})}


def spelled(arguments: Any, number: int) -> Any:
    try:
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError:
        return arguments
    return read if number % 3 == 0 and isinstance(read, dict) else json.dumps(read, indent=number % 3, sort_keys=True)


def edit(state: State, text: str, number: int) -> None:
    state.change(number, content=text or "edited")


def rethink(state: State, text: str, number: int) -> None:
    state.change(state.last_answer(), reasoning_content=text)


def wrong_ids(state: State, text: str, number: int) -> None:
    ids = ([None], ["1", "x"], [number], None, text, {"a": 1})[number % 6]
    state.change(state.last_answer(), generation_token_ids=ids, prompt_token_ids=ids)


def inherit(state: State, text: str, number: int) -> None:
    """NeMo Gym 0.4.0: a message that was never sampled comes with the ids of the one before."""
    state.messages += [{**state.messages[state.last_answer()], "role": "assistant", "content": text}, user("and now?")]


def inject(state: State, text: str, number: int) -> None:
    state.messages.insert(number % (len(state.messages) + 1), {"role": "assistant", "content": text})


def instruct(state: State, text: str, number: int) -> None:
    role = ("system", "developer")[number % 2]
    state.messages.insert(number % (len(state.messages) + 1), {"role": role, "content": text})


def compact(state: State, text: str, number: int) -> None:
    state.messages[:] = [user(f"in short: {text}")]


def cut(state: State, text: str, number: int) -> None:
    del state.messages[1 + number % len(state.messages) :]


def remove(state: State, text: str, number: int) -> None:
    if len(state.messages) > 1:
        del state.messages[number % len(state.messages)]


def prefill(state: State, text: str, number: int) -> None:
    state.messages.append({"role": "assistant", "content": text or "Well"})
    state.args["continue_final_message"] = True


def resume(state: State, text: str, number: int) -> None:
    """Has the policy go on with its own answer."""
    del state.messages[state.last_answer() + 1 :]
    state.args["continue_final_message"] = True


def toggle_tools(state: State, text: str, number: int) -> None:
    state.tools = [] if state.tools else [PROBE_TOOL]


def toggle_thinking(state: State, text: str, number: int) -> None:
    state.args["enable_thinking"] = not state.args.get("enable_thinking", True)


def nothing(state: State, text: str, number: int) -> None:
    pass


ACTS: Sequence[Callable[[State, str, int], None]] = (
    nothing,
    nothing,
    drop("prompt_token_ids", "generation_token_ids", "generation_log_probs"),
    drop("reasoning_content"),
    respell,
    edit,
    rethink,
    wrong_ids,
    inherit,
    inject,
    instruct,
    compact,
    cut,
    remove,
    prefill,
    resume,
    toggle_tools,
    toggle_thinking,
)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def follow_up(answer: Message, text: str) -> list[Message]:
    """Results of the calls, where there are some, else the user's word."""
    calls = answer.get("tool_calls") or ()
    results = [{"role": "tool", "tool_call_id": call["id"], "content": text or "found"} for call in calls]
    return results or [user(text or "go on")]


# -- what the policy samples --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    act: Callable[[State, str, int], None]
    text: str
    number: int
    said: str
    ids: Sequence[int]
    """Sampled after the text that is said."""
    letters: bool
    ends: str
    twice: bool
    """Two calls are in flight for the same messages."""
    follow: str


STEPS = st.builds(
    Step,
    act=st.sampled_from(ACTS),
    text=TEXT,
    number=st.integers(0, 11),
    said=TEXT | st.just(CALLED) | st.builds("<think>\n{}\n</think>\n\n{}".format, TEXT, TEXT),
    ids=IDS,
    letters=st.booleans(),
    ends=st.sampled_from(["stop", "stop", "length", "abort"]),
    twice=st.sampled_from([False, False, False, True]),
    follow=TEXT,
)


def sampled(chat: Chat, step: Step, more: Sequence[int]) -> list[int]:
    pieces = list(step.said) if step.letters else [step.said]
    ids = [token for piece in pieces for token in chat.ids(piece)]
    ids += [token % len(chat.tokenizer) for token in (*step.ids, *more)]
    return [*ids, chat.format.stop_token_ids[0]] if step.ends == "stop" else ids


def heard(agent: Agent, plan: PromptPlan, ids: Sequence[int], tools: Sequence[Any]) -> Message:
    """The message that the gateway would make of it."""
    parsed = agent.chat.format.parse(plan.prompt_ids, ids, tools)
    message: Message = {"role": "assistant", "content": parsed.content}
    if parsed.reasoning:
        message["reasoning_content"] = parsed.reasoning
    if parsed.tool_calls:
        message["tool_calls"] = [
            {
                "id": f"call{place:05}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for place, call in enumerate(parsed.tool_calls)
        ]
    return message


# -- what holds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reasoning", ["keep", "drop"])
@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(CHATS), opening=TEXT, steps=st.lists(STEPS, min_size=1, max_size=7))
def test_every_prompt_extends_or_says_why_not(reasoning: Any, name: str, opening: str, steps: list[Step]) -> None:
    agent = Agent(chat_of(name), reasoning)
    state = State([user(opening)])
    for step in steps:
        kept = State(list(state.messages), list(state.tools), dict(state.args))
        step.act(state, step.text, step.number)
        plans = [ask(agent, state) for _ in range(1 + step.twice)]
        if None in plans:  # this template does not write that: the agent takes it back
            state = kept
            continue
        for place, plan in enumerate(plans):
            answer = say(agent, plan, sampled(agent.chat, step, [7] * place), state.tools, step.ends)
        state.args.pop("continue_final_message", None)
        state.messages += [answer, *follow_up(answer, step.follow)]
    check_conservation(agent.record.turns)


def ask(agent: Agent, state: State) -> PromptPlan | None:
    try:
        plan = agent.record.plan(state.messages, state.tools, template_args=state.args)
    except AlignmentError:
        return None
    decode, turns = agent.chat.tokenizer.decode, agent.record.turns
    if plan.parent is None:
        assert bool(turns) == (plan.cause is not None)
        shown, text = state.messages, decode(plan.prompt_ids)
    else:
        assert plan.cause is None
        held = held_by(turns[plan.parent])
        assert plan.prompt_ids[: len(held)] == held
        shown, text = state.messages[-1:], decode(plan.prompt_ids[len(held) :])
    for message in shown:
        if message["role"] == "user" or (message["role"] == "tool" and writes_results_plain(agent.chat)):
            assert squeezed(canonical(message).content) in squeezed(text)
    return plan


def say(agent: Agent, plan: PromptPlan, ids: Sequence[int], tools: Sequence[Any], ends: Any) -> Message:
    message = heard(agent, plan, ids, tools)
    echo = agent.sample(plan, ids, message, ends)
    assert agent.record.turn_of(message) == len(agent.record.turns) - 1
    return echo


@cache
def writes_results_plain(chat: Chat) -> bool:
    """Whether a tool's result is written as it is, and not as JSON."""
    call = {"id": "call00000", "type": "function", "function": {"name": "probe_tool", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "call00000", "content": 'a "word"'}
    try:
        return 'a "word"' in chat.text([user("q"), {"role": "assistant", "tool_calls": [call]}, result], [PROBE_TOOL])
    except AlignmentError:
        return False


def squeezed(text: str) -> str:
    """Templates trim."""
    return "".join(text.split())
