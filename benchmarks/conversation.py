"""What the benchmarks talk about: a tokenizer, an agent that calls tools, and the gateway in this process.

Nothing is downloaded. The tokenizer is a byte-pair encoding that is trained on the spot, on what every Python carries:
the reference of the language and the source of its library. A token is about four characters of either, as with the
tokenizers of models (its ids are shorter, since its vocabulary is small). The chat template is Qwen3's, with tools.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import dataclasses
import datetime
import difflib
import doctest
import inspect
import subprocess
import tarfile
import time
import typing
import zipfile
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pydoc_data.topics import topics  # type: ignore[import-untyped]
from typing import Any, Final

import orjson
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gymlink.align import load_format
from gymlink.gateway import ROLLOUT_FIELD, PolicyService, create_app
from gymlink.types import Generation, Message, Sampling

SECRET = "of the benchmarks"
VOCABULARY = 4096
MODULES: Final = (argparse, ast, dataclasses, datetime, difflib, doctest, inspect, subprocess, tarfile, typing, zipfile)
PROSE: Final = tuple(topics.values())
"""What the policy says."""
CODE: Final = tuple(map(inspect.getsource, MODULES))
"""What tools answer."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
ID_FIELDS = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")
ASK_FOR_IDS = {"logprobs": True, "top_logprobs": 0, "return_tokens_as_token_ids": True}
"""What Gym's model server adds to a call when it is to carry the token ids (`return_token_id_information`)."""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    training = trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator([*PROSE, *CODE], training)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = files("trl").joinpath("chat_templates/qwen3.jinja").read_text()
    return made


class Text:
    """Text by the token, which goes on where it stopped and begins anew at its end."""

    def __init__(self, source: tuple[str, ...], start: int = 0) -> None:
        self._ids = _encoded(source)
        self._at = start

    def take(self, tokens: int) -> str:
        self._at %= len(self._ids) - tokens
        text = tokenizer().decode(self._ids[self._at : self._at + tokens])
        self._at += tokens
        return str(text)


@cache
def _encoded(texts: tuple[str, ...]) -> Sequence[int]:
    return tokenizer().encode("\n".join(texts), add_special_tokens=False)


def tool(name: str) -> dict[str, Any]:
    query = {"type": "string", "description": "What to look for, in a few words."}
    parameters = {"type": "object", "properties": {"query": query}, "required": ["query"]}
    described = {"name": name, "description": f"Runs `{name}` and says what it found.", "parameters": parameters}
    return {"type": "function", "function": described}


TOOLS = [tool(name) for name in ("search", "open_page", "run_command")]


@dataclass(frozen=True, slots=True)
class Turn:
    """The size of a turn, in tokens: what the policy samples, and what the tool answers."""

    sampled: int
    observed: int


@dataclass
class Agent:
    """One rollout's agent, with the messages that the model server of NeMo Gym 0.4.0 sends for it.

    Each turn the policy says something and calls a tool, and the tool answers. With `ids_on_messages`, the token ids
    and logprobs of every sampled message come with the answer and go back with each later call.
    """

    rollout_id: str
    turn: Turn
    opening: int = 512
    """Tokens of the system message and of the first question together."""
    ids_on_messages: bool = False
    words: Text = field(default_factory=lambda: Text(PROSE))
    pages: Text = field(default_factory=lambda: Text(CODE))
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.messages = [
            {"role": "system", "content": self.words.take(self.opening // 2)},
            {"role": "user", "content": self.words.take(self.opening // 2)},
        ]

    def request(self) -> bytes:
        """The body of the next call."""
        asked = ASK_FOR_IDS if self.ids_on_messages else {}
        tagged = {
            ROLLOUT_FIELD: self.rollout_id,
            "metadata": {"extra_body": f'{{"{ROLLOUT_FIELD}":"{self.rollout_id}"}}'},
        }
        return orjson.dumps({"model": "policy", "messages": self.messages, "tools": TOOLS, **tagged, **asked})

    def sample(self) -> Generation:
        """What the engine answers to the next call."""
        call = f'\n<tool_call>\n{{"name": "search", "arguments": {{"query": "{len(self.messages)}"}}}}\n</tool_call>'
        ids = tokenizer().encode(call + "<|im_end|>", add_special_tokens=False)
        said = tokenizer().encode(self.words.take(self.turn.sampled - len(ids)), add_special_tokens=False)
        return ready([*said, *ids])

    def take(self, answer: Mapping[str, Any]) -> None:
        """Go on with the message of an answer (a whole chat completion) and the result of its call."""
        message = answer["choices"][0]["message"]
        kept = ("role", "content", "tool_calls", *(ID_FIELDS if self.ids_on_messages else ()))
        called = message["tool_calls"][0]["id"]
        result = {"role": "tool", "tool_call_id": called, "content": self.pages.take(self.turn.observed)}
        self.messages = [*self.messages, {name: message[name] for name in kept}, result]


def ready(token_ids: Sequence[int]) -> Generation:
    """A generation with logprobs that have as many digits as real ones."""
    return Generation(tuple(token_ids), tuple(-(token % 97 + 1) / 97 for token in token_ids), "stop")


class ReadyEngine:
    """An `Engine` that takes no time: it hands out the generation that was put into it."""

    max_context = None
    weight_version = 0

    def __init__(self) -> None:
        self.next: Generation | None = None

    async def generate(self, *_: object, **__: object) -> Generation:
        assert self.next is not None
        return self.next

    async def aclose(self) -> None: ...


class Gateway:
    """The gateway's whole application, called in this process: all that it does for a call, but for the sockets."""

    def __init__(self) -> None:
        self.engine = ReadyEngine()
        self.service = PolicyService(load_format(tokenizer()), self.engine, Sampling())
        self._app = create_app(self.service, SECRET)
        self._runner = asyncio.Runner()

    def call(self, body: bytes, sampled: Generation) -> tuple[bytes, float]:
        """The answer to a chat completion for which the engine samples this, and the CPU seconds that it took."""
        self.engine.next = sampled
        parts: list[bytes] = []
        status = 0

        async def receive(said: list[bytes] = [body]) -> MutableMapping[str, Any]:  # noqa: B006 - for this call alone
            if said:
                return {"type": "http.request", "body": said.pop(), "more_body": False}
            await asyncio.Event().wait()  # the client stays
            raise AssertionError

        async def send(event: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = event.get("status", status)
            parts.append(event.get("body", b""))

        headers = {"authorization": f"Bearer {SECRET}", "content-type": "application/json", "content-length": len(body)}
        path = "/v1/chat/completions"
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), str(value).encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }

        async def answer() -> float:
            started = time.process_time()
            await self._app(scope, receive, send)
            return time.process_time() - started

        seconds = self._runner.run(answer())
        content = b"".join(parts)
        assert status == 200, content
        return content, seconds

    def close(self) -> None:
        self._runner.close()

    def __enter__(self) -> Gateway:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
