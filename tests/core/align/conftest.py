"""Tokenizers made on the spot: a byte-level BPE with a real chat template and that template's own control tokens."""

# ruff: noqa: RUF001 - DeepSeek writes its control tokens with these bars
from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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


def make_tokenizer(template: str, text: str | None = None) -> Any:
    """A tokenizer with the named template of the installed trl."""
    text = text or (TEMPLATES / f"{template}.jinja").read_text()
    eos = next((eos for prefix, eos in _EOS if template.startswith(prefix)), "<|im_end|>")
    tokenizer = Tokenizer.from_str(_trained())
    bos = next((bos for prefix, bos in _BOS if template.startswith(prefix)), "<|endoftext|>")
    special = dict.fromkeys([eos, bos, "<|endoftext|>", *_CONTROL.findall(text)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _TAGS])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token="<|endoftext|>", bos_token=bos)
    made.chat_template = text
    return made


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `template` runs on every template."""
    if "template" in metafunc.fixturenames:
        metafunc.parametrize("template", NAMES)


@pytest.fixture(scope="session")
def template_names() -> list[str]:
    return NAMES


@pytest.fixture(scope="session")
def make() -> Any:
    """Makes a fresh tokenizer, with another template text if given."""
    return make_tokenizer


@pytest.fixture(scope="session")
def tokenizer_of() -> Any:
    """Makes, and keeps, the tokenizer of a template."""
    return cache(make_tokenizer)


@pytest.fixture(scope="session")
def format_of(tokenizer_of: Any) -> Any:
    """Loads, and keeps, the format of a template."""
    from gymlink.align import load_format

    return cache(lambda name: load_format(tokenizer_of(name)))
