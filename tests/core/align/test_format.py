"""Choosing a format, speaking a template's dialect, and reading what was sampled."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.chat_template_utils import add_response_schema

from chats import FORMATS
from gymlink.align import ChatFormat, Parsed, load_format
from gymlink.align.template import PROBE_TOOL, probe_call
from gymlink.errors import AlignmentError, ConfigError

USER = {"role": "user", "content": "question"}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


# -- choosing -----------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_template_says_what_to_do(make: Any) -> None:
    tokenizer = make("qwen3")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"no chat template.*alignment.format"):
        load_format(tokenizer)
    chat = load_format(tokenizer, name="qwen3")
    assert chat.name == "renderers:qwen3"


def test_names_that_cannot_work(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"no chat format 'qwen33'.*qwen3"):
        load_format(make("qwen3"), name="qwen33")
    with pytest.raises(ConfigError, match=r"'glm-4\.5' does not fit"):
        load_format(make("qwen3"), name="glm-4.5")
    with pytest.raises(ConfigError, match="does not write a plain user message"):
        load_format(make("qwen3", "nothing"))


def test_a_known_format_is_proven_not_believed(make: Any, format_of: Any) -> None:
    assert format_of("qwen3").name == "renderers:qwen3"  # a folder of one's own: no model name to go by
    renamed = make("qwen3", CHATML + OPEN)
    renamed.name_or_path = "Qwen/Qwen3-8B"
    assert load_format(renamed).name == "template"
    assert load_format(make("qwen3"), name="template").name == "template"
    assert isinstance(format_of("qwen3"), ChatFormat)


def test_a_known_format_alone_extends_as_its_template_does(make: Any, format_of: Any) -> None:
    tokenizer, own = make("qwen3"), format_of("qwen3")
    named = load_format(tokenizer, name="qwen3")
    answer = ids(tokenizer, "an answer")
    for messages, tools in (([USER], []), ([{"role": "tool", "tool_call_id": "c", "content": "found"}], [PROBE_TOOL])):
        for end, finish in (([tokenizer.eos_token_id], "stop"), ([], "length")):
            prompt = named.render([USER], tools)
            assert prompt == own.render([USER], tools)
            expected = own.extend(prompt, [*answer, *end], finish, messages, tools)
            assert named.extend(prompt, [*answer, *end], finish, messages, tools) == expected
    injected = [USER, {"role": "assistant", "content": "x"}, USER]
    assert named.extend([1], answer, "length", injected)
    assert named.extend([1], answer, "length", injected) == own.extend([1], answer, "length", injected)
    args = {"continue_final_message": True}
    assert named.render([USER, {"role": "assistant", "content": "Sure"}], template_args=args)[-1:] == tuple(
        ids(tokenizer, "Sure")[-1:]
    )
    with pytest.raises(AlignmentError, match="nonsense"):
        named.render([USER], template_args={"nonsense": 1})


# -- proofs -------------------------------------------------------------------------------------------------------

UNPROVABLE = {
    "hoists what follows": "{% for m in messages %}{{ m.content if m.role == 'user' }}|{% endfor %}" + CHATML + OPEN,
    "counts": "{% for m in messages %}<|im_start|>{{ loop.index }}{{ m.content }}<|im_end|>{% endfor %}" + OPEN,
    "knows the length": CHATML + "{{ messages | length }}" + OPEN,
    "drops all but the last": "{% set m = messages[-1] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + OPEN,
    "sorts": "{% for m in messages | sort(attribute='content') %}{{ m.content }}<|im_end|>{% endfor %}" + OPEN,
}


@pytest.mark.parametrize("template_text", UNPROVABLE.values(), ids=UNPROVABLE.keys())
def test_what_cannot_be_proven_is_not_used(make: Any, template_text: str) -> None:
    chat = load_format(make("qwen3", template_text))
    assert chat.extend([1], [2], "stop", [USER]) is None
    assert not any("user" in kind for kind in chat.report.extends)


def test_a_new_system_message_that_the_template_moves_to_the_front_is_not_an_extension(format_of: Any) -> None:
    assert format_of("deepseekv3").extend([1], [2], "stop", [{"role": "system", "content": "new rules"}, USER]) is None


def test_template_arguments_are_proven_apart(format_of: Any, tokenizer_of: Any) -> None:
    chat, tokenizer = format_of("qwen3"), tokenizer_of("qwen3")
    added = chat.extend([1], [tokenizer.eos_token_id], "stop", [USER], template_args={"enable_thinking": False})
    assert tokenizer.decode(added).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_turn_cut_inside_its_reasoning_is_closed_as_the_template_closes_it(format_of: Any, tokenizer_of: Any) -> None:
    chat, tokenizer = format_of("qwen3_5_think"), tokenizer_of("qwen3_5_think")
    prompt = chat.render([USER])
    assert tokenizer.decode(prompt).endswith("<think>\n")
    added = tokenizer.decode(chat.extend(prompt, ids(tokenizer, "hm"), "length", [USER]))
    assert added.startswith("\n</think>\n\n<|im_end|>\n<|im_start|>user\nquestion")


def test_text_of_the_user_does_not_open_reasoning(format_of: Any, tokenizer_of: Any) -> None:
    chat, tokenizer = format_of("qwen3"), tokenizer_of("qwen3")
    prompt = chat.render([{"role": "user", "content": "<think>"}])
    added = tokenizer.decode(chat.extend(prompt, ids(tokenizer, "hm"), "length", [USER]))
    assert added.startswith("<|im_end|>\n")
    assert format_of("qwen3_training").parse(prompt, ids(tokenizer, "hm")).content == "hm"


def test_the_report_says_what_a_template_leaves_out(format_of: Any) -> None:
    assert format_of("qwen3").report.writes_tools
    assert not format_of("gemma").report.writes_tools
    assert set(format_of("phi3").report.refused) == {"tool result", "tool result, after text", "tool results"}
    assert format_of("deepseekv3").report.forks == ("tool result", "tool result, after text", "tool results")


# -- dialects -----------------------------------------------------------------------------------------------------


def test_developer_becomes_system_where_the_template_knows_only_that(format_of: Any) -> None:
    for name, maps in (("qwen3", True), ("llama3", True), ("qwen2_5", True), ("gptoss", False), ("gemma4_v5", False)):
        messages = [{"role": role, "content": "rules"} for role in ("developer", "system")]
        rendered = [format_of(name).render([message, USER]) for message in messages]
        assert format_of(name)._template.maps_developer is maps
        if maps:
            assert rendered[0] == rendered[1]


def test_templates_without_a_system_role(format_of: Any, tokenizer_of: Any) -> None:
    system = {"role": "system", "content": "rules"}
    with pytest.raises(AlignmentError, match="System role not supported"):
        format_of("gemma").render([system, USER])
    folded = tokenizer_of("gemma3").decode(format_of("gemma3").render([system, USER]))
    assert "<start_of_turn>user\nrules\n\nquestion" in folded


def test_a_role_that_would_vanish_is_refused(format_of: Any) -> None:
    with pytest.raises(AlignmentError, match="writes nothing for a message of role 'tool'"):
        format_of("phi3").render([USER, {"role": "assistant", "content": "a"}, {"role": "tool", "content": "x"}])


VANISHES = {
    "gemma4": [USER, {"role": "assistant", "content": "a"}, {"role": "tool", "tool_call_id": "c", "content": "found"}],
    "llama3": [USER, {"role": "assistant", "content": "", "tool_calls": [probe_call("c", "x")]}, USER],
    "renderers:minimax-m2": [USER, {"role": "assistant", "content": "a"}, {"role": "system", "content": "rules"}, USER],
    "renderers:qwen3-vl": [USER, {"role": "assistant", "content": "a"}, {"role": "system", "content": "rules"}, USER],
}


@pytest.mark.parametrize("name", VANISHES)
def test_a_message_that_would_vanish_where_it_stands_is_refused(name: str, format_of: Any) -> None:
    """Other messages of its role are written, or the same one elsewhere: only the conversation's shape tells."""
    chat = format_of(name)
    with pytest.raises(AlignmentError, match=r"writes nothing for a message of role '\w+' \(number [23] of [34]\)"):
        chat.render(VANISHES[name])
    assert chat.render(VANISHES[name][:1])


def test_a_sampled_call_that_the_template_does_not_write_stands_in_the_prompt(
    format_of: Any, tokenizer_of: Any
) -> None:
    """LFM2's own calls are content: `tool_calls` are ignored. The ids that were sampled hold the call."""
    chat, result = format_of("lfm2"), {"role": "tool", "tool_call_id": "c", "content": "found"}
    called = {"role": "assistant", "content": "", "tool_calls": [probe_call("c", "x")]}
    added = chat.extend([1], [2], "length", [result], [PROBE_TOOL], answered=called)
    assert "found" in tokenizer_of("lfm2").decode(added)
    with pytest.raises(AlignmentError, match="writes nothing for a message of role 'assistant'"):
        chat.render([USER, called, result], [PROBE_TOOL])


def test_a_format_of_renderers_shows_a_developers_message(format_of: Any, tokenizer_of: Any) -> None:
    """renderers itself writes nothing for this role in most formats, without a word."""
    for name in [f"renderers:{known}" for known in FORMATS]:
        rendered = format_of(name).render([{"role": "developer", "content": "some rules"}, USER])
        assert "some rules" in tokenizer_of(name).decode(rendered), name


def test_content_as_parts_and_arguments_as_json(format_of: Any, tokenizer_of: Any) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}
    for name in ("qwen3", "smolvlm", "llava_next", "gemma3"):
        assert "one two" in tokenizer_of(name).decode(format_of(name).render([parts]))
    with pytest.raises(AlignmentError, match="image_url"):
        format_of("qwen3").render([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    function = {"name": "probe_tool", "arguments": '{"query": "zwolf"}'}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": function}]}
    for name in ("glm4moe", "deepseekv3", "qwen3", "llama3_2", "gemma4_v5"):
        rendered = format_of(name).render(
            [USER, call, {"role": "tool", "tool_call_id": "c", "content": "x"}], [PROBE_TOOL]
        )
        assert "zwolf" in tokenizer_of(name).decode(rendered)


def test_a_request_cannot_take_over_the_template(format_of: Any) -> None:
    with pytest.raises(AlignmentError, match="chat_template"):
        format_of("qwen3").render([USER], template_args={"chat_template": "x"})


# -- reading ------------------------------------------------------------------------------------------------------

XML_CALL = "<tool_call>\n<function=probe_tool>\n<parameter=query>\n7\n</parameter>\n</function>\n</tool_call>"
CALLS = {
    "qwen3": '<tool_call>\n{"name": "probe_tool", "arguments": {"query": "7"}}\n</tool_call>',
    "qwen2_5": '<tool_call>\n{"name": "probe_tool", "arguments": {"query": "7"}}\n</tool_call>',
    "qwen3_5_nothink": XML_CALL,
    "qwen3_8": XML_CALL,
    "glm4moe": "\n<think></think>\n<tool_call>probe_tool\n"
    "<arg_key>query</arg_key>\n<arg_value>7</arg_value>\n</tool_call>",
    "llama3_2": '{"name": "probe_tool", "parameters": {"query": "7"}}',
}


def read(chat: Any, tokenizer: Any, text: str, tools: Any = (PROBE_TOOL,)) -> Any:
    prompt = chat.render([USER], tools)
    opened = tokenizer.decode(prompt).endswith("<think>\n")
    text = "a thought\n</think>\n\n" + text if opened else text
    return chat.parse(prompt, [*ids(tokenizer, text), chat.stop_token_ids[0]], tools)


@pytest.mark.parametrize("name", CALLS)
def test_tool_calls_are_read(name: str, format_of: Any, tokenizer_of: Any) -> None:
    parsed = read(format_of(name), tokenizer_of(name), CALLS[name])
    (call,) = parsed.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("probe_tool", {"query": "7"})
    assert parsed.content.strip() == ""


@pytest.mark.parametrize("name", CALLS)
def test_without_tools_a_call_is_text(name: str, format_of: Any, tokenizer_of: Any) -> None:
    parsed = read(format_of(name), tokenizer_of(name), CALLS[name], tools=())
    assert parsed.tool_calls == ()
    assert "probe_tool" in parsed.content


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "qwen3_8"])
@pytest.mark.parametrize("bad", ['{"name": "probe_tool", "arguments": {"query"', '{"no": 1}', "[]", "nonsense"])
def test_malformed_calls_stay_in_the_content(name: str, bad: str, format_of: Any, tokenizer_of: Any) -> None:
    for text in (f"<tool_call>\n{bad}\n</tool_call>", f"<tool_call>\n{bad}"):
        parsed = read(format_of(name), tokenizer_of(name), "look: " + text)
        assert parsed.tool_calls == ()
        assert "look:" in parsed.content
        assert bad in parsed.content


def test_reasoning_is_read_from_the_completion_and_from_what_the_prompt_opened(
    format_of: Any, tokenizer_of: Any
) -> None:
    for name in ("qwen3", "qwen3_5_think", "deepseek_r1_distill", "qwen3_training"):
        chat, tokenizer = format_of(name), tokenizer_of(name)
        prompt = chat.render([USER])
        opened = "" if tokenizer.decode(prompt).endswith("<think>\n") else "<think>\n"
        text = ids(tokenizer, opened + "a thought\n</think>\n\nan answer")
        parsed = chat.parse(prompt, [*text, chat.stop_token_ids[0]])
        assert (parsed.reasoning.strip(), parsed.content.strip()) == ("a thought", "an answer")
        cut = chat.parse(prompt, ids(tokenizer, opened + "a thou"))
        assert (cut.reasoning.strip(), cut.content) == ("a thou", "")


def test_where_a_parser_fails_the_text_itself_is_the_message(make: Any) -> None:
    class Broken:
        def parse(self, *_: Any) -> Parsed:
            raise RuntimeError("surprise")

    tokenizer = make("qwen3")
    chat = load_format(tokenizer)
    chat._parser = Broken()
    assert chat.parse([1], ids(tokenizer, "an answer"), [PROBE_TOOL]) == Parsed("an answer")
    assert chat.parse([1], [-1, 2**40]) == Parsed("")


def test_the_tokenizers_own_parser_is_used_where_it_carries_one(make: Any) -> None:
    tokenizer = add_response_schema(make("qwen2_5"))
    chat = load_format(tokenizer)
    parsed = read(chat, tokenizer, "let me see\n" + CALLS["qwen2_5"])
    assert parsed.content.strip() == "let me see"
    assert [call.name for call in parsed.tool_calls] == ["probe_tool"]
    assert "nonsense" in read(chat, tokenizer, "<tool_call>nonsense</tool_call>").content


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen2_5", "qwen3_5_think", "glm4moe", "llama3_2", "nemotron_3_nano", "gptoss"]
)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_nothing_sampled_makes_reading_fail(name: str, format_of: Any, tokenizer_of: Any, data: Any) -> None:
    size = len(tokenizer_of(name))
    tags = [
        tokenizer_of(name).convert_tokens_to_ids(tag) for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>")
    ]
    some = st.integers(0, size + 5) | st.sampled_from(tags)
    sampled = data.draw(st.lists(some, max_size=30))
    prompt = data.draw(st.lists(st.integers(0, size - 1), max_size=5))
    tools = data.draw(st.sampled_from([[], [PROBE_TOOL]]))
    parsed = format_of(name).parse(prompt, sampled, tools)
    assert isinstance(parsed.content, str)
    assert tools or not parsed.tool_calls
    for call in parsed.tool_calls:
        assert call.name
        json.loads(call.arguments)


def test_ids_outside_the_vocabulary_are_read_by_a_named_format_too(make: Any) -> None:
    named = load_format(make("qwen3"), name="qwen3")
    assert named.parse([1], [-1]).content == ""
