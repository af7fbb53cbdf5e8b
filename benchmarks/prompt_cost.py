"""What one more turn costs the gateway, by length of the history, against rendering the whole history twice.

The double render is what a bridge does that finds its place by rendering with and without the new messages (and then
cuts at an EOS token). CPU time of one thread, best of several.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gymlink.align import RolloutRecord, load_format
from gymlink.types import Generation

HISTORIES = (2_000, 10_000, 35_000, 130_000)
SAMPLED = 64
OBSERVATION = "the door is open and there are three keys on the table. " * 2


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = files("trl").joinpath("chat_templates/qwen2_5.jinja").read_text()
    return tokenizer


def cpu_ms(work: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best * 1e3


def conversation(record: RolloutRecord, tokenizer: Any, length: int) -> list[Mapping[str, Any]]:
    """Play turns until the history has `length` tokens; the messages end with a new one from the environment."""
    reply = "I look around and take the second key. "
    sampled = (*tokenizer.encode(reply, add_special_tokens=False)[: SAMPLED - 1], tokenizer.eos_token_id)
    messages: list[Mapping[str, Any]] = [{"role": "user", "content": OBSERVATION}]
    while True:
        plan = record.plan(messages)
        if len(plan.prompt_ids) >= length:
            return messages
        assistant = {"role": "assistant", "content": reply.strip()}
        record.add(plan, Generation(sampled, (-0.1,) * len(sampled), "stop"), assistant)
        messages += [assistant, {"role": "user", "content": OBSERVATION}]


def run() -> list[dict[str, float | int]]:
    tokenizer = make_tokenizer()
    chat_format = load_format(tokenizer)
    rows: list[dict[str, float | int]] = []
    for length in HISTORIES:
        record = RolloutRecord("bench", chat_format)
        messages = conversation(record, tokenizer, length)

        def double_render(messages: list[Mapping[str, Any]] = messages) -> None:
            for upto, prompt in ((messages, True), (messages[:-1], False)):
                text = tokenizer.apply_chat_template(upto, tokenize=False, add_generation_prompt=prompt)
                tokenizer.encode(text, add_special_tokens=False)

        ours = cpu_ms(lambda record=record, messages=messages: record.plan(messages), 20)  # type: ignore[misc]
        theirs = cpu_ms(double_render, 3)
        rows.append(
            {
                "history tokens": len(record.plan(messages).prompt_ids),
                "plan ms": ours,
                "double render ms": theirs,
                "ratio": theirs / ours,
            }
        )
    return rows
