"""What a rollout's record promises, on real templates: the failures of counting EOS tokens, each by name; what agents
do to a history; and what others ask of a record."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from chats import Agent, chat_of, held_by
from gymlink.align import build_segments, canonical
from gymlink.align import history as history_module
from gymlink.align import record as record_module
from gymlink.align.template import PROBE_TOOL, probe_call
from gymlink.types import ForkCause, Generation

U1 = {"role": "user", "content": "question"}
U2 = {"role": "user", "content": "another question"}
SYSTEM = {"role": "system", "content": "some rules"}
# Counting EOS fails outright on these: their history never holds eos_token.
NO_EOS = ["gemma", "gemma3", "glm4moe", "gptoss", "phi3"]
TEMPLATES = ["qwen3", "qwen2_5", "qwen3_5_think", "llama3", *NO_EOS]


@pytest.fixture(params=TEMPLATES)
def agent(request: pytest.FixtureRequest) -> Agent:
    return Agent(chat_of(request.param))


@pytest.fixture
def qwen() -> Agent:
    return Agent(chat_of("qwen3"))


# -- the failures of counting EOS tokens --------------------------------------------------------------------------


def test_user_text_after_an_assistant_message_without_ids_stays(agent: Agent) -> None:
    first = agent.say([U1], "an answer")
    injected = {"role": "assistant", "content": "never sampled"}
    plan = agent.record.plan([U1, first, U2, injected, {"role": "user", "content": "the last word"}])
    assert plan.parent == 0
    added = agent.added(plan)
    assert "another question" in added
    assert "never sampled" in added
    assert "the last word" in added


def test_continue_final_message_neither_drops_nor_doubles(qwen: Agent) -> None:
    prefill = {"role": "assistant", "content": "Sure, it"}
    second = qwen.say([U1, prefill], " is four", continue_final_message=True)
    (turn,) = qwen.record.turns
    assert qwen.chat.tokenizer.decode(turn.prompt_ids).endswith("Sure, it")
    for history in ([U1, prefill, second, U2], [U1, {"role": "assistant", "content": "Sure, it is four"}, U2]):
        plan = qwen.record.plan(history)
        assert plan.parent == 0
        assert qwen.added(plan) == "\n<|im_start|>user\nanother question<|im_end|>\n<|im_start|>assistant\n"


def test_a_new_prefill_after_a_sampled_turn_extends(qwen: Agent) -> None:
    first = qwen.say([U1], "an answer")
    prefill = {"role": "assistant", "content": "Well"}
    plan = qwen.record.plan([U1, first, U2, prefill], template_args={"continue_final_message": True})
    assert plan.parent == 0
    assert qwen.added(plan).endswith("Well")


def test_a_cut_turn_is_continued_where_it_was_cut(qwen: Agent) -> None:
    first = qwen.say([U1], "", ids=qwen.chat.ids("an ans"), message={"role": "assistant", "content": "an ans"})
    plan = qwen.record.plan([U1, first], template_args={"continue_final_message": True})
    turn = qwen.record.turns[0]
    assert (plan.parent, plan.prompt_ids) == (0, turn.prompt_ids + turn.completion_ids)


def test_text_that_spells_eos_in_stripped_reasoning(qwen: Agent) -> None:
    spelled = [token for letter in "<|im_end|>" for token in qwen.chat.ids(letter)]
    ids = [
        *qwen.chat.ids("<think>\nstop with "),
        *spelled,
        *qwen.chat.ids("\n</think>\n\nan answer"),
        qwen.chat.tokenizer.eos_token_id,
    ]
    for echo in ({"content": "an answer"}, {"content": "<think>stop with <|im_end|></think>an answer"}):
        agent = Agent(qwen.chat)
        message = {"role": "assistant", "content": "an answer", "reasoning_content": "stop with <|im_end|>"}
        agent.say([U1], "", ids=ids, message=message)
        plan = agent.record.plan([U1, {"role": "assistant", **echo}, U2])
        assert plan.parent == 0
        assert agent.added(plan) == "\n<|im_start|>user\nanother question<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("changed", ["edited", "added"])
def test_a_changed_system_message_is_a_fork(qwen: Agent, changed: str) -> None:
    before = [U1] if changed == "added" else [SYSTEM, U1]
    first = qwen.say(before, "an answer")
    messages = [{"role": "system", "content": "other rules"}, U1, first, U2]
    plan = qwen.record.plan(messages)
    assert (plan.parent, plan.cause) == (None, ForkCause.EDITED)
    assert plan.prompt_ids == qwen.fresh(messages)


def test_edited_history_is_a_fork(agent: Agent) -> None:
    first = agent.say([U1], "an answer")
    messages = [{"role": "user", "content": "changed"}, first, U2]
    plan = agent.record.plan(messages)
    assert (plan.parent, plan.cause) == (None, ForkCause.EDITED)
    assert plan.prompt_ids == agent.fresh(messages)


def test_tools_added_later_are_a_fork_where_the_template_writes_them(agent: Agent) -> None:
    first = agent.say([U1], "an answer")
    plan = agent.record.plan([U1, first, U2], [PROBE_TOOL])
    if agent.chat.format.writes_tools:
        assert (plan.parent, plan.cause) == (None, ForkCause.TOOLS_CHANGED)
        assert plan.prompt_ids == agent.fresh([U1, first, U2], [PROBE_TOOL])
    else:
        assert (plan.parent, plan.prompt_ids) == (0, agent.record.plan([U1, first, U2]).prompt_ids)


def test_ids_of_another_conversation_are_not_used(agent: Agent) -> None:
    foreign = {"role": "assistant", "content": "elsewhere", "prompt_token_ids": [1, 2], "generation_token_ids": [3, 4]}
    agent.say([U1], "an answer")
    plan = agent.record.plan([{"role": "user", "content": "other"}, foreign, U2])
    assert (plan.parent, plan.cause) == (None, ForkCause.FOREIGN_IDS)
    matching = {"role": "assistant", "content": "an answer", "generation_token_ids": [3, 4]}
    assert agent.record.plan([U1, matching, U2]).parent == 0  # the record wins over ids that contradict it


def test_ids_that_contradict_the_record_reach_no_prompt(agent: Agent) -> None:
    first = agent.say([U1], "an answer")
    for ids in ([3, 4], ["1", "2"], first["generation_token_ids"][:-1]):
        plan = agent.record.plan([U1, {**first, "prompt_token_ids": [5], "generation_token_ids": ids}, U2])
        assert plan.parent == 0
        assert "another question" in agent.added(plan)  # which starts with the ids that were sampled


@pytest.mark.parametrize(
    "ids", [None, "abc", ["7", "x"], [None], {"a": 1}, 5, [], ["1", "2"], [10**30], [float("nan")]]
)
def test_ids_that_are_null_strings_or_nonsense(agent: Agent, ids: Any) -> None:
    first = agent.say([U1], "an answer")
    echo = {**first, "generation_token_ids": ids, "prompt_token_ids": ids, "generation_log_probs": ids}
    assert agent.record.plan([U1, echo, U2]).parent == 0


@pytest.mark.parametrize("name", NO_EOS)
def test_templates_whose_history_holds_no_eos(name: str, format_of: Any, tokenizer_of: Any) -> None:
    agent = Agent(chat_of(name))
    history = [U1]
    for turn in range(4):
        history.append(agent.say(history, f"answer {turn}"))
        history.append({"role": "user", "content": f"question {turn}"})
    assert [turn.parent for turn in agent.record.turns] == [None, 0, 1, 2]
    segments, dropped = build_segments(agent.record.turns, on_history_rewrite="mask")
    assert (len(segments), dropped) == (1, {})
    eos = agent.chat.tokenizer.eos_token_id
    rendered = agent.fresh(history)
    assert eos not in rendered


# -- what agents do to a history ----------------------------------------------------------------------------------


def test_an_injected_message_that_inherits_ids_is_new_text(qwen: Agent) -> None:
    first = qwen.say([U1], "an answer")
    injected = {**first, "content": "never sampled"}  # NeMo Gym 0.4.0: ResponsesConverterState keeps the last ids
    plan = qwen.record.plan([U1, first, U2, injected, U1])
    assert plan.parent == 0
    assert "never sampled" in qwen.added(plan)


def test_an_empty_answer_may_be_absent(agent: Agent) -> None:
    agent.say([U1], "", message={"role": "assistant", "content": ""})
    for history in ([U1, U2], [U1, {"role": "assistant", "content": None}, U2]):
        plan = agent.record.plan(history)
        assert plan.parent == 0
        assert "another question" in agent.added(plan)


def test_the_same_prompt_again_is_not_a_rewrite(agent: Agent) -> None:
    agent.say([U1], "", message={"role": "assistant", "content": ""})
    assert (agent.record.plan([U1]).parent, agent.record.plan([U1]).cause) == (None, ForkCause.RESTARTED)
    sub = [{"role": "system", "content": "you are a sub-agent"}, U2]
    assert agent.record.plan([U1, U2]).parent == 0
    if agent.chat.name not in ("gemma", "phi3"):  # these have no system role
        assert agent.record.plan(sub).cause is ForkCause.RESTARTED


def test_a_compacted_history(qwen: Agent) -> None:
    history = [SYSTEM, U1]
    for turn in range(3):
        history += [qwen.say(history, f"answer {turn}"), U2]
    plan = qwen.record.plan([SYSTEM, {"role": "user", "content": "summary of it all"}])
    assert (plan.parent, plan.cause) == (None, ForkCause.COMPACTED)


def test_equal_text_with_other_ids_is_told_apart_by_the_echo(qwen: Agent) -> None:
    plans = [qwen.record.plan([U1]), qwen.record.plan([U1])]  # two calls in flight
    echoes = []
    for plan, ids in zip(plans, ((11, 12), (13,)), strict=True):
        qwen.record.add(plan, Generation(ids, (0.0,) * len(ids), "length"), {"role": "assistant", "content": "same"})
        echoes.append({"role": "assistant", "content": "same", "generation_token_ids": list(ids)})
    assert [qwen.record.plan([U1, echo, U2]).parent for echo in echoes] == [0, 1]
    assert qwen.record.plan([U1, {"role": "assistant", "content": "same"}, U2]).parent == 1


def test_an_edited_answer_branches_where_the_history_still_holds(qwen: Agent) -> None:
    first = qwen.say([U1], "one")
    qwen.say([U1, first, U2], "two")
    plan = qwen.record.plan([U1, first, U2, {"role": "assistant", "content": "two, edited"}, U1])
    assert plan.parent == 0
    assert "two, edited" in qwen.added(plan)


def test_an_edited_answer_is_the_cause_where_nothing_continues_the_one_before() -> None:
    agent = Agent(chat_of("deepseekv3"))  # writes every system message at the front
    first = agent.say([U1], "one")
    agent.say([U1, first, U2], "two")
    for answer, cause in (("two, edited", ForkCause.EDITED), ("two", ForkCause.RETEMPLATED)):
        plan = agent.record.plan([U1, first, U2, {"role": "assistant", "content": answer}, SYSTEM, U1])
        assert (plan.parent, plan.cause) == (None, cause)


def test_arguments_in_another_spelling_are_the_same_call(qwen: Agent) -> None:
    def called(arguments: Any) -> Any:
        function = {"name": "probe_tool", "arguments": arguments}
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c", "type": "function", "function": function}],
        }

    text = '<tool_call>\n{"name": "probe_tool", "arguments": {"query":"x",   "n": 1}}\n</tool_call>'
    qwen.say([U1], text, tools=[PROBE_TOOL], message=called('{"query":"x",   "n": 1}'))
    result = {"role": "tool", "tool_call_id": "c", "content": "found"}
    for arguments in ('{"n": 1, "query": "x"}', {"query": "x", "n": 1}):
        plan = qwen.record.plan([U1, called(arguments), result], [PROBE_TOOL])
        assert plan.parent == 0
        assert "<tool_response>\nfound\n</tool_response>" in qwen.added(plan)


def test_other_template_arguments_are_a_fork_where_the_history_changes_with_them(qwen: Agent) -> None:
    messages = [U1, qwen.say([U1], "an answer"), U2]
    plan = qwen.record.plan(messages, template_args={"enable_thinking": False})
    assert (plan.parent, plan.cause) == (0, None)  # Qwen3 writes only the generation prompt otherwise
    assert qwen.added(plan).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    gemma = Agent(chat_of("gemma4"))
    messages = [U1, gemma.say([U1], "an answer"), U2]
    plan = gemma.record.plan(messages, template_args={"enable_thinking": True})
    assert (plan.parent, plan.cause) == (None, ForkCause.TOOLS_CHANGED)
    assert plan.prompt_ids == gemma.fresh(messages, enable_thinking=True)


def test_what_the_template_does_not_show_is_no_rewrite(agent: Agent) -> None:
    """An edit that leaves the text as it was: the fresh render starts with what was sampled, so nothing is forked."""
    agent.say([U1], "an answer")
    messages = [{**U1, "content": "question  "}, {"role": "assistant", "content": "an answer"}, U2]
    decode, fresh = agent.chat.tokenizer.decode, agent.fresh(messages)
    trims = decode(fresh).startswith(decode(held_by(agent.record.turns[0])))
    assert trims or agent.chat.name not in ("llama3", "gemma", "gemma3")
    plan = agent.record.plan(messages)
    assert (plan.parent, plan.cause) == ((0, None) if trims else (None, ForkCause.EDITED))


def test_a_cut_character_is_no_text_to_go_on_from(qwen: Agent) -> None:
    half = qwen.chat.ids("\U0001f600")[:1]
    messages = [U1, qwen.say([U1], "", ids=half, message={"role": "assistant", "content": "\ufffd"}), U2]
    assert qwen.record.plan(messages).parent == 0  # proven for the kind, whatever was sampled
    plan = qwen.record.plan(messages, template_args={"enable_thinking": False})
    assert (plan.parent, plan.cause) == (None, ForkCause.RETOKENIZED)
    assert plan.prompt_ids == qwen.fresh(messages, enable_thinking=False)


def test_reasoning_that_a_fresh_render_leaves_out_is_the_cause() -> None:
    """DeepSeek's own template keeps no reasoning before a tool result, and no continuation is proven there."""
    agent = Agent(chat_of("deepseekv3"))
    message = {
        "role": "assistant",
        "content": "",
        "reasoning_content": "a thought",
        "tool_calls": [probe_call("c", "x")],
    }
    first = agent.say([U1], "a thought</think>a call", message=message, tools=[PROBE_TOOL])
    result = {"role": "tool", "tool_call_id": "c", "content": "found"}
    assert agent.record.plan([U1, first, result], [PROBE_TOOL]).cause is ForkCause.REASONING_STRIPPED


def test_of_equal_answers_the_one_that_was_given_these_tools_is_continued(qwen: Agent) -> None:
    for tools in ([PROBE_TOOL], []):
        qwen.say([U1], "an answer", tools=tools)
    for parent, tools in enumerate(([PROBE_TOOL], [])):
        assert qwen.record.plan([U1, {"role": "assistant", "content": "an answer"}, U2], tools).parent == parent


@pytest.mark.parametrize(
    "changed",
    [{"content": "edited"}, {"tool_calls": [probe_call("c", "other")]}, {"reasoning_content": "other thoughts"}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_message_that_changed_since_the_last_call_is_read_anew(qwen: Agent, changed: Any) -> None:
    message = {
        "role": "assistant",
        "content": "a look",
        "reasoning_content": "a thought",
        "tool_calls": [probe_call("c", "this")],
    }
    first = qwen.say([U1], "sampled", message=message, tools=[PROBE_TOOL])
    result = {"role": "tool", "tool_call_id": "c", "content": "found"}
    assert qwen.record.plan([U1, first, result], [PROBE_TOOL]).parent == 0
    plan = qwen.record.plan([U1, {**first, **changed}, result], [PROBE_TOOL])
    assert (plan.parent, plan.cause) == (None, ForkCause.EDITED)


# -- what a call costs --------------------------------------------------------------------------------------------


def test_what_was_read_is_not_read_again(qwen: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    for module in (record_module, history_module):
        monkeypatch.setattr(module, "canonical", lambda message: read.append(message) or canonical(message))
    history: list[Any] = [U1]
    for turn in range(30):
        answer = qwen.say(history, f"answer {turn}")
        history = json.loads(json.dumps([*history, answer, U2]))  # new objects, as over HTTP
    assert [turn.parent for turn in qwen.record.turns] == [None, *range(29)]
    assert len(read) == 1 + 2 * 30 - 1  # for each turn its answer when it is sampled, and then the message that is new


def test_no_ids_of_a_message_are_held(qwen: Agent) -> None:
    """NeMo Gym sends the whole prompt's ids with each answer, so a history holds them over and over."""
    first = qwen.say([U1], "an answer")
    messages = [U1, first, U2]
    held = sys.getrefcount(first["prompt_token_ids"]), sys.getrefcount(first["generation_token_ids"])
    qwen.say(messages, "another answer")
    assert (sys.getrefcount(first["prompt_token_ids"]), sys.getrefcount(first["generation_token_ids"])) == held


# -- what others ask of a record ----------------------------------------------------------------------------------


def test_a_required_prefix_chooses_among_turns_of_equal_text(qwen: Agent) -> None:
    plans = [qwen.record.plan([U1]), qwen.record.plan([U1])]
    for plan, ids in zip(plans, ((11, 12), (13,)), strict=True):
        qwen.record.add(plan, Generation(ids, (0.0,) * len(ids), "length"), {"role": "assistant", "content": "same"})
    history = [U1, {"role": "assistant", "content": "same"}, U2]
    for parent in (0, 1):
        plan = qwen.record.plan(history, required_prefix=list(held_by(qwen.record.turns[parent])))
        assert (plan.parent, qwen.added(plan)) == (parent, qwen.added(qwen.record.plan(history)))


def test_a_required_prefix_says_what_a_reworded_message_is(agent: Agent) -> None:
    agent.say([U1], "an answer")
    first = held_by(agent.record.turns[0])
    reworded = {"role": "assistant", "content": "An answer, in other words."}
    plan = agent.record.plan([U1, reworded, U2], required_prefix=first)
    assert (plan.parent, plan.cause) == (0, None)
    assert "other words" not in agent.added(plan)


def test_a_required_prefix_makes_no_edited_text_vanish(agent: Agent) -> None:
    message = agent.say([U1], "an answer")
    first = held_by(agent.record.turns[0])
    edited = [{"role": "user", "content": "changed"}, message, U2]
    for prefix in (first, first[:-1], (*first, 5), [7], []):
        plan = agent.record.plan(edited, required_prefix=prefix)
        assert (plan.parent, plan.cause, plan.prompt_ids) == (None, ForkCause.EDITED, agent.fresh(edited))
    if agent.chat.format.writes_tools:
        plan = agent.record.plan([U1, message, U2], [PROBE_TOOL], required_prefix=first)
        assert plan.cause is ForkCause.TOOLS_CHANGED


def test_the_turn_that_a_message_came_from(qwen: Agent) -> None:
    first = qwen.say([U1], "an answer")
    assert qwen.record.turn_of({"role": "assistant", "content": "an answer\n"}) == 0
    assert qwen.record.turn_of({"role": "assistant", "content": "another"}) is None
    qwen.say([U1, first, U2], "an answer")
    assert qwen.record.turn_of({"role": "assistant", "content": "an answer"}) == 1  # the latest that said so


def test_of_equal_calls_the_turn_with_these_ids(qwen: Agent) -> None:
    for index in ("a", "b"):
        call = {"role": "assistant", "content": None, "tool_calls": [probe_call(index, "this")]}
        qwen.say([U1], "sampled", message=call, tools=[PROBE_TOOL])
    for index, turn in (("a", 0), ("b", 1), ("made up", 1)):
        assert qwen.record.turn_of({"role": "assistant", "tool_calls": [probe_call(index, "this")]}) == turn


def test_of_equal_answers_the_turn_with_this_reasoning(qwen: Agent) -> None:
    for reasoning in ("one", "two"):
        said = {"role": "assistant", "content": "four", "reasoning_content": reasoning}
        qwen.say([U1], "sampled", message=said)
    assert qwen.record.turn_of({"role": "assistant", "content": "<think>one</think>four"}) == 0
    assert qwen.record.turn_of({"role": "assistant", "content": "four"}) == 1


def test_a_continued_message_is_found_with_and_without_its_beginning(qwen: Agent) -> None:
    qwen.say([U1, {"role": "assistant", "content": "Sure, it"}], " is four", continue_final_message=True)
    for text in ("is four", "Sure, it is four"):
        assert qwen.record.turn_of({"role": "assistant", "content": text}) == 0


# -- reasoning in history -----------------------------------------------------------------------------------------


def thought(agent: Agent, messages: Any, tools: Any = ()) -> Any:
    message = {"role": "assistant", "content": "an answer", "reasoning_content": "a thought"}
    text = "<think>\na thought\n</think>\n\nan answer"
    return agent.say(messages, text, message=message, tools=tools)


def test_reasoning_is_kept_by_default(qwen: Agent) -> None:
    first = thought(qwen, [U1])
    first.pop("reasoning_content")
    plan = qwen.record.plan([U1, first, U2])
    assert plan.parent == 0
    assert "a thought" in qwen.chat.tokenizer.decode(plan.prompt_ids)


def test_reasoning_dropped_at_a_user_turn_is_a_fork_and_the_templates_own_render(qwen: Agent) -> None:
    agent = Agent(qwen.chat, "drop")
    first = thought(agent, [U1], [PROBE_TOOL])
    result = {"role": "tool", "tool_call_id": "c", "content": "found"}
    within = agent.record.plan([U1, first, result], [PROBE_TOOL])
    assert within.parent == 0
    plan = agent.record.plan([U1, first, U2], [PROBE_TOOL])
    assert (plan.parent, plan.cause) == (None, ForkCause.REASONING_STRIPPED)
    assert plan.prompt_ids == agent.fresh([U1, first, U2], [PROBE_TOOL])
    assert "a thought" not in agent.chat.tokenizer.decode(plan.prompt_ids)


def test_reasoning_of_any_turn_before_is_dropped(qwen: Agent) -> None:
    agent = Agent(qwen.chat, "drop")
    history = [U1, thought(agent, [U1], [PROBE_TOOL]), {"role": "tool", "tool_call_id": "c", "content": "found"}]
    history = [*history, agent.say(history, "no thought", tools=[PROBE_TOOL]), U2]
    plan = agent.record.plan(history, [PROBE_TOOL])
    assert [turn.parent for turn in agent.record.turns] == [None, 0]
    assert (plan.parent, plan.cause) == (None, ForkCause.REASONING_STRIPPED)
    assert "a thought" not in agent.chat.tokenizer.decode(plan.prompt_ids)


def test_reasoning_that_also_reads_elsewhere_is_dropped_too(qwen: Agent) -> None:
    agent = Agent(qwen.chat, "drop")
    message = {"role": "assistant", "content": "an answer", "reasoning_content": U1["content"]}
    first = agent.say([U1], "<think>\nquestion\n</think>\n\nan answer", message=message)
    plan = agent.record.plan([U1, first, U2])
    assert (plan.parent, plan.cause) == (None, ForkCause.REASONING_STRIPPED)


def test_reasoning_that_came_with_an_injected_message_is_known_from_then_on() -> None:
    agent = Agent(chat_of("qwen3_training"))  # writes all reasoning, so that another one shows
    injected = {"role": "assistant", "content": "never sampled", "reasoning_content": "nor thought"}
    history = [U1, agent.say([U1], "an answer"), U2, injected, U1]
    history = [*history, agent.say(history, "a second answer"), U2]
    assert agent.record.plan(history).parent == 1
    history[3] = {**injected, "reasoning_content": "something else"}
    plan = agent.record.plan(history)
    assert (plan.parent, plan.cause) == (None, ForkCause.EDITED)


def test_a_template_that_keeps_reasoning_extends_with_drop_too(format_of: Any, tokenizer_of: Any) -> None:
    agent = Agent(chat_of("qwen2_5"), "drop")
    text = "<think>a thought</think>an answer"
    agent.say([U1], text, message={"role": "assistant", "content": text})
    plan = agent.record.plan([U1, {"role": "assistant", "content": text}, U2])
    assert (plan.parent, plan.cause) == (0, None)


def test_edited_reasoning_is_a_fork(qwen: Agent) -> None:
    first = thought(qwen, [U1])
    plan = qwen.record.plan([U1, {**first, "reasoning_content": "other thoughts"}, U2])
    assert (plan.parent, plan.cause) == (None, ForkCause.EDITED)
