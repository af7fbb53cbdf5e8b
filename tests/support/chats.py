"""Chats for tests: tokenizers made on the spot for every chat template of trl and every format of renderers, and an
agent that samples what it is told to.

A tokenizer here is a byte-level BPE with the control tokens that the template or the format needs. Nothing is
downloaded.
"""

# ruff: noqa: RUF001 - DeepSeek writes its control tokens with these bars
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gymlink.align import ChatFormat, PromptPlan, RolloutRecord, build_segments, load_format
from gymlink.align.known import known_names
from gymlink.align.template import ChatTemplate
from gymlink.errors import ConfigError
from gymlink.types import FinishReason, Generation, Turn

Message = dict[str, Any]

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# Templates that write text for models that see images too are text templates as well; only text is sent.
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))

_CONTROL = re.compile(
    r"<\|[a-zA-Z_]+\|>|<｜[^｜]+｜>|<\|\"\|>|<(?:start_of_turn|end_of_turn|end_of_utterance|bos|eos)>|"
    r"<\|?(?:turn|channel|tool|tool_call|tool_response)\|>|<\|(?:turn|channel|tool|tool_call|tool_response)>|"
    r"\[gMASK\]|<sop>|</s>|\[/?INST\]"
)
_TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
_TAGS += ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
_BOS = [
    ("gemma", "<bos>"),
    ("diffusion_gemma", "<bos>"),
    ("llama3", "<|begin_of_text|>"),
    ("deepseek", "<｜begin▁of▁sentence｜>"),
    ("cohere", "<BOS_TOKEN>"),
    ("lfm2", "<|startoftext|>"),
]
# What each family stops at, as its models' generation configs say.
_EOS = [
    ("phi3", "<|endoftext|>"),
    ("glm", "<|endoftext|>"),
    ("gptoss", "<|return|>"),
    ("gemma4", "<eos>"),
    ("diffusion_gemma", "<eos>"),
    ("gemma", "<eos>"),
    ("cohere", "<|END_OF_TURN_TOKEN|>"),
    ("deepseek", "<｜end▁of▁sentence｜>"),
    ("llama3", "<|eot_id|>"),
    ("llava", "</s>"),
    ("idefics3", "<end_of_utterance>"),
    ("smolvlm", "<end_of_utterance>"),
    ("muse", "<|eot|>"),
]

UNBUILDABLE: Mapping[str, str] = {"gpt-oss": "failed to download or load vocab file"}
"""Formats of renderers that no tokenizer made here can serve, and what they answer. gpt-oss is written with the
vocabulary that openai_harmony downloads, checks and uses instead of the tokenizer's; trl's gptoss template is here."""
FORMATS = sorted(set(known_names()) - UNBUILDABLE.keys())
_ASKED_FOR = re.compile(r"(?:[Tt]oken|for) '([^']+)'")


# -- tokenizers ---------------------------------------------------------------------------------------------------


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [
        "system user assistant tool question answer the quick brown fox jumps over the lazy dog",
        "0 1 2 3 4 5",
    ] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*corpus, *(path.read_text() for path in TEMPLATES.glob("*.jinja"))], trainer)
    return tokenizer.to_str()


def _tokenizer(control: Sequence[str], eos: str, bos: str) -> Any:
    tokenizer = Tokenizer.from_str(_trained())
    special = dict.fromkeys([eos, bos, "<|endoftext|>", *control])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token="<|endoftext|>", bos_token=bos)


def make_tokenizer(template: str, text: str | None = None) -> Any:
    """A tokenizer with the named template of the installed trl."""
    text = text or (TEMPLATES / f"{template}.jinja").read_text()
    eos = next((eos for prefix, eos in _EOS if template.startswith(prefix)), "<|im_end|>")
    bos = next((bos for prefix, bos in _BOS if template.startswith(prefix)), "<|endoftext|>")
    made = _tokenizer(_CONTROL.findall(text), eos, bos)
    made.chat_template = text
    return made


def make_tokenizer_for_format(name: str) -> Any:
    """A tokenizer without a template, with the control tokens that the format of renderers asks for."""
    control: list[str] = []
    while True:
        tokenizer = _tokenizer(control, "<|endoftext|>", "<|endoftext|>")
        try:
            load_format(tokenizer, name=name)
        except ConfigError as error:
            asked = _ASKED_FOR.findall(str(error))
            if not asked or asked[-1] in control:
                raise
            control.append(asked[-1])
        else:
            return tokenizer


# -- formats ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chat:
    """A chat format, its tokenizer, and what it writes for a whole conversation."""

    name: str
    tokenizer: Any
    format: ChatFormat
    template: ChatTemplate | None

    @property
    def control(self) -> set[int]:
        """Ids of the control tokens."""
        return {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, messages: Sequence[Message], tools: Sequence[Any] = (), **args: Any) -> str:
        """The whole conversation as the template, or else the format, writes it."""
        if self.template is not None:
            return self.template.text(messages, tools, args)
        return self.tokenizer.decode(self.format.render(messages, tools, template_args=args))


@cache
def chat_of(name: str) -> Chat:
    """The chat of a template of trl, or of a format of renderers where the name begins with `renderers:`."""
    if name.startswith("renderers:"):
        known = name.removeprefix("renderers:")
        tokenizer = make_tokenizer_for_format(known)
        return Chat(name, tokenizer, load_format(tokenizer, name=known), None)
    tokenizer = make_tokenizer(name)
    return Chat(name, tokenizer, load_format(tokenizer), ChatTemplate(tokenizer))


CHATS = [*NAMES, *(f"renderers:{name}" for name in FORMATS)]


# -- an agent -----------------------------------------------------------------------------------------------------


class Agent:
    """A rollout whose policy samples what it is told to."""

    def __init__(self, chat: Chat, reasoning: Literal["keep", "drop"] = "keep") -> None:
        self.chat = chat
        self.record = RolloutRecord("r", chat.format, reasoning=reasoning)

    def sample(
        self, plan: PromptPlan, ids: Sequence[int], message: Message, finish_reason: FinishReason = "stop"
    ) -> Message:
        """The message as it comes back to the agent, ids and logprobs on it."""
        generation = Generation(tuple(ids), (-0.5,) * len(ids), finish_reason)
        turn = self.record.add(plan, generation, message)
        echoed = {"prompt_token_ids": list(turn.prompt_ids), "generation_token_ids": list(ids)}
        return {**message, **echoed, "generation_log_probs": list(turn.logprobs)}

    def say(
        self,
        messages: Sequence[Message],
        text: str,
        *,
        tools: Sequence[Any] = (),
        ids: Sequence[int] | None = None,
        message: Message | None = None,
        **args: Any,
    ) -> Message:
        """One whole turn: `text` is sampled (or `ids`), and ended as the policy learned to; the message comes back."""
        plan = self.record.plan(messages, tools, template_args=args)
        if ids is None:
            stop = self.chat.format.extend([1], [], "length", [{"role": "user", "content": "q"}])[0]
            ids = [*self.chat.ids(text), stop]
        return self.sample(plan, ids, message or {"role": "assistant", "content": text})

    def fresh(self, messages: Sequence[Message], tools: Sequence[Any] = (), **args: Any) -> tuple[int, ...]:
        """What the template itself makes of the messages."""
        return self.chat.format.render(messages, tools, template_args=args)

    def added(self, plan: PromptPlan) -> str:
        """The text of what follows the sampled ids, which are held to be there."""
        assert plan.parent is not None
        assert plan.cause is None
        held = held_by(self.record.turns[plan.parent])
        assert plan.prompt_ids[: len(held)] == held
        return self.chat.tokenizer.decode(plan.prompt_ids[len(held) :])


def held_by(turn: Turn) -> tuple[int, ...]:
    return turn.prompt_ids + turn.completion_ids


def check_conservation(turns: Sequence[Turn]) -> None:
    """Each sampled token is trained once, with its own logprob and after its own prompt, or it is counted."""
    sampled = sum(len(turn.completion_ids) for turn in turns)
    for policy in ("fork", "last", "mask"):
        segments, dropped = build_segments(turns, on_history_rewrite=policy)
        assert sampled == sum(segment.trained_tokens for segment in segments) + sum(dropped.values())
        for segment in segments:
            ids = segment.prompt_ids + segment.response_ids
            for index in segment.turns:
                held = held_by(turns[index])
                assert ids[: len(held)] == held
        if policy == "fork":
            assert not dropped
