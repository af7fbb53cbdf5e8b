"""Agents that drive their own calls with the real SDKs, over real HTTP: every turn extends what was sampled before it.

Each agent does what such agents do: it keeps what it needs for itself, writes tool calls anew, and loses token ids, and
reasoning too where it can.
"""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from gymlink.gateway import rollout_key, rollout_path

SCHEMA = {"type": "object", "properties": {"query": {"type": "string"}, "count": {"type": "integer"}}}
SYSTEM = "Look things up before you answer."
FINAL = "It is four."
TURNS = [
    "<think>\nTwo places to look.\n</think>\n\nI look twice."
    '<tool_call>\n{"name": "look", "arguments": {"query": "a \\u00e9 \\"b\\"", "count": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "look", "arguments": {"count":2,"query":"c"}}\n</tool_call>',
    '<think>\nOnce more.\n</think>\n\n<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>',
    f"<think>\nNow I know.\n</think>\n\n{FINAL}",
    "Still four.",
]
CALLS = [[{"query": 'a \u00e9 "b"', "count": 1}, {"query": "c", "count": 2}], [{}], [], []]
TEXTS = ["I look twice.", "", FINAL, "Still four."]
REASONING = ["Two places to look.", "Once more.", "Now I know.", ""]


class Agent:
    """What the three have in common: whether they stream, and whether they send reasoning back."""

    def __init__(self, client: Any, *, stream: bool, thinks_back: bool) -> None:
        self.client, self.stream, self.thinks_back = client, stream, thinks_back

    async def turn(self) -> tuple[str, str, list[tuple[str, Any]]]:
        """One call of the policy: its text, its reasoning, its tool calls as (id, arguments)."""
        raise NotImplementedError


class ChatAgent(Agent):
    def __init__(self, client: AsyncOpenAI, **how: Any) -> None:
        super().__init__(client, **how)
        self.messages: list[Any] = [{"role": "system", "content": SYSTEM}]
        self.tools = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]

    def say(self, text: str) -> None:
        self.messages.append({"role": "user", "content": [{"type": "text", "text": text}]})

    def found(self, call_id: str, text: str) -> None:
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    async def turn(self) -> tuple[str, str, list[tuple[str, Any]]]:
        asked: Any = {"model": "policy", "messages": self.messages, "tools": self.tools, "max_tokens": 900}
        if self.stream:
            async with self.client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as events:
                final = await events.get_final_completion()
        else:
            final = await self.client.chat.completions.create(**asked)
        assert final.usage.total_tokens == final.usage.prompt_tokens + final.usage.completion_tokens
        message = final.choices[0].message
        assert final.choices[0].finish_reason == ("tool_calls" if message.tool_calls else "stop")
        calls = [(call.id, json.loads(call.function.arguments)) for call in message.tool_calls or ()]
        reasoning = message.reasoning_content if hasattr(message, "reasoning_content") else ""
        echo = {"role": "assistant", "content": message.content or ""}
        if calls:
            echo["tool_calls"] = [
                {"id": name, "type": "function", "function": {"name": "look", "arguments": json.dumps(given, indent=1)}}
                for name, given in calls
            ]
        if self.thinks_back and reasoning:
            echo["reasoning_content"] = reasoning
        self.messages.append(echo)
        return message.content or "", reasoning, calls


class ResponsesAgent(Agent):
    """`remembers` lets the gateway keep the conversation: only what is new is sent."""

    def __init__(self, client: AsyncOpenAI, *, remembers: bool = False, **how: Any) -> None:
        super().__init__(client, **how)
        self.items: list[Any] = []
        self.remembers = remembers
        self.last: str | None = None
        self.tools = [{"type": "function", "name": "look", "parameters": SCHEMA, "strict": True}]

    def say(self, text: str) -> None:
        self.items.append({"role": "user", "content": [{"type": "input_text", "text": text}]})

    def found(self, call_id: str, text: str) -> None:
        self.items.append({"type": "function_call_output", "call_id": call_id, "output": text})

    async def turn(self) -> tuple[str, str, list[tuple[str, Any]]]:
        asked: Any = {"model": "policy", "input": self.items, "tools": self.tools, "instructions": SYSTEM}
        if self.remembers and self.last:
            asked["previous_response_id"] = self.last
        if self.stream:
            async with self.client.responses.stream(**asked) as events:
                seen = [event async for event in events]
                final = await events.get_final_response()
            assert [event.sequence_number for event in seen] == list(range(len(seen)))
        else:
            final = await self.client.responses.create(**asked)
        assert (final.status, final.incomplete_details) == ("completed", None)
        self.last = final.id
        if self.remembers:
            self.items = []
        else:
            kept = [item for item in final.output if self.thinks_back or item.type != "reasoning"]
            self.items += [item.model_dump(exclude={"parsed_arguments"}) for item in kept]
        thoughts = [part.text for item in final.output if item.type == "reasoning" for part in item.content]
        calls = [(item.call_id, json.loads(item.arguments)) for item in final.output if item.type == "function_call"]
        return final.output_text, "".join(thoughts), calls


class AnthropicAgent(Agent):
    def __init__(self, client: AsyncAnthropic, **how: Any) -> None:
        super().__init__(client, **how)
        self.messages: list[Any] = []
        self.checksum = 0

    def say(self, text: str) -> None:
        self._add({"type": "text", "text": text, "cache_control": {"type": "ephemeral"}})

    def found(self, call_id: str, text: str) -> None:
        self._add({"type": "tool_result", "tool_use_id": call_id, "content": [{"type": "text", "text": text}]})

    def _add(self, block: Any) -> None:
        """All that is said between two turns is one user message."""
        if not self.messages or self.messages[-1]["role"] != "user":
            self.messages.append({"role": "user", "content": []})
        self.messages[-1]["content"].append(block)

    async def turn(self) -> tuple[str, str, list[tuple[str, Any]]]:
        self.checksum += 1
        billing = f"x-anthropic-billing-header: cc_version=2.1; cch={self.checksum};"
        asked: Any = {
            "model": "policy",
            "max_tokens": 900,
            "messages": self.messages,
            "system": [{"type": "text", "text": billing}, {"type": "text", "text": SYSTEM}],
            "tools": [{"name": "look", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}],
            "tool_choice": {"type": "auto"},
            "metadata": {"user_id": "me"},
        }
        if self.stream:
            async with self.client.messages.stream(**asked) as events:
                final = await events.get_final_message()
        else:
            final = await self.client.messages.create(**asked)
        counted = await self.client.messages.count_tokens(
            **{name: value for name, value in asked.items() if name not in {"max_tokens", "metadata"}}
        )
        assert counted.input_tokens == final.usage.input_tokens
        calls = [(block.id, block.input) for block in final.content if block.type == "tool_use"]
        assert final.stop_reason == ("tool_use" if calls else "end_turn")
        kept = [block for block in final.content if self.thinks_back or block.type != "thinking"]
        self.messages.append({"role": "assistant", "content": [block.model_dump() for block in kept]})
        texts = [block.text for block in final.content if block.type == "text"]
        thoughts = [block.thinking for block in final.content if block.type == "thinking"]
        return "".join(texts), "".join(thoughts), calls


@asynccontextmanager
async def chat_by_key(url: str, secret: str, **how: Any) -> AsyncIterator[Agent]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=rollout_key(secret, "0.a"), max_retries=0) as client:
        yield ChatAgent(client, **how)


@asynccontextmanager
async def responses_by_path(url: str, secret: str, **how: Any) -> AsyncIterator[Agent]:
    base = url + rollout_path("0.a", "/v1")
    async with AsyncOpenAI(base_url=base, api_key=secret, max_retries=0) as client:
        yield ResponsesAgent(client, **how)


@asynccontextmanager
async def responses_that_remember(url: str, secret: str, **how: Any) -> AsyncIterator[Agent]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=rollout_key(secret, "0.a"), max_retries=0) as client:
        yield ResponsesAgent(client, remembers=True, **how)


@asynccontextmanager
async def anthropic_by_path(url: str, secret: str, **how: Any) -> AsyncIterator[Agent]:
    async with AsyncAnthropic(base_url=url + rollout_path("0.a", ""), api_key=secret, max_retries=0) as client:
        yield AnthropicAgent(client, **how)


@asynccontextmanager
async def anthropic_by_key(url: str, secret: str, **how: Any) -> AsyncIterator[Agent]:
    async with AsyncAnthropic(base_url=url, api_key=rollout_key(secret, "0.a"), max_retries=0) as client:
        yield AnthropicAgent(client, **how)


KINDS = [chat_by_key, responses_by_path, responses_that_remember, anthropic_by_path, anthropic_by_key]


@pytest.fixture
def says(tokenizer, chat_format) -> Callable[[list[str]], Callable[[Any], tuple[int, ...]]]:
    """A script that samples these texts, one after the other."""

    def make(texts: list[str]) -> Callable[[Any], tuple[int, ...]]:
        left = iter(texts)
        return lambda _: (*tokenizer.encode(next(left), add_special_tokens=False), chat_format.stop_token_ids[0])

    return make


@pytest.mark.parametrize("thinks_back", [False, True], ids=["reasoning dropped", "reasoning sent back"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("kind", KINDS)
async def test_every_turn_of_an_agent_extends_the_one_before(gateway, says, kind, stream, thinks_back) -> None:
    client = await gateway(says(TURNS), max_tokens=1000)
    rollout = client.service.open("0.a")
    async with kind(client.server.url, client.secret, stream=stream, thinks_back=thinks_back) as agent:
        agent.say("What is it?")
        for number in range(len(TURNS)):
            text, reasoning, calls = await agent.turn()
            assert (text, reasoning, [given for _, given in calls]) == (TEXTS[number], REASONING[number], CALLS[number])
            for name, _ in calls:
                agent.found(name, f"found {number}")
            if not calls:
                agent.say("Are you sure?")
    turns = rollout.record.turns
    assert [turn.parent for turn in turns] == [None, 0, 1, 2]
    assert [turn.cause for turn in turns] == [None] * 4
    for turn, before in zip(turns[1:], turns, strict=False):
        held = before.prompt_ids + before.completion_ids
        assert turn.prompt_ids[: len(held)] == held
    assert rollout.sampled_tokens == client.service.totals.sampled_tokens == sum(len(t.completion_ids) for t in turns)


async def test_all_dialects_make_one_prompt(gateway, says) -> None:
    """An agent can be changed for one that speaks another dialect, and the policy sees the same."""
    prompts = []
    for kind in KINDS:
        client = await gateway(says(TURNS), max_tokens=1000)
        client.service.open("0.a")
        async with kind(client.server.url, client.secret, stream=False, thinks_back=False) as agent:
            agent.say("What is it?")
            _, _, calls = await agent.turn()
            for name, _ in calls:
                agent.found(name, "found")
            await agent.turn()
        prompts.append([call.prompt_ids for call in client.service.engine.calls])
    assert all(one == prompts[0] for one in prompts)
