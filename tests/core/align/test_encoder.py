"""A faster encoder writes the tokenizer's very ids, or is not used."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gymlink.align import encoder as encoder_module
from gymlink.align import load_format
from gymlink.align.encoder import Encoder, is_of_a_known_kind, probes

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = GPT4.replace(r"\p{N}{1,3}", r"\p{N}")
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "the quick brown fox jumps over the lazy dog's 12345 tails",
    "def f(x):\n    return x + 1\n",
    "日本語 über naïve 한국어",
]


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def by_bytes(*before: Any, use_regex: bool = False, prefix: bool = False) -> Any:
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)])


USED: dict[str, tuple[Any, Any]] = {
    "gpt2": (None, by_bytes(use_regex=True)),
    "gpt2 with a prefix space": (None, by_bytes(use_regex=True, prefix=True)),
    "llama 3": (None, by_bytes(split(GPT4))),
    "qwen": (normalizers.NFC(), by_bytes(split(QWEN))),
    "deepseek": (
        None,
        by_bytes(split(r"\p{N}{1,3}"), split(r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"), split(DEEPSEEK)),
    ),
    "starcoder": (None, by_bytes(pre_tokenizers.Digits(individual_digits=True), use_regex=True)),
}
NOT_USED: dict[str, tuple[Any, Any]] = {
    "metaspace": (None, pre_tokenizers.Metaspace()),
    "legacy spaces": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
    "compatible characters": (normalizers.NFKC(), by_bytes(use_regex=True)),
    "words": (None, pre_tokenizers.Whitespace()),
}


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    normalizer, pre_tokenizer = (USED | NOT_USED)[name]
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS * 9, trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    )
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    backend.add_tokens(
        [
            AddedToken("<|tool|>", lstrip=True, rstrip=True, normalized=False),
            AddedToken("<think>", normalized=False),
            AddedToken("word", single_word=True, normalized=True),
            AddedToken("<fim", normalized=True),
        ]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    made.chat_template = "{% for m in messages %}<think>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    return made


def gemma() -> PreTrainedTokenizerFast:
    """Spaces are written as a letter of their own, and what has no token as its bytes."""
    pieces = ["<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thequickbrownfxjmpsvlazydg'."]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, "▁t", "he", "▁the", "▁▁"]))}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁")]
    backend = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def expected(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", USED)
def test_it_is_used_where_every_probe_is_the_tokenizers(name: str) -> None:
    tokenizer = tokenizer_of(name)
    encoder = Encoder(tokenizer)
    assert encoder.is_fast
    for text in probes(json.loads(tokenizer.backend_tokenizer.to_str())):
        assert encoder._fast.encode(text).ids == expected(tokenizer, text)


def test_spaces_as_letters_and_bytes_where_there_is_no_token() -> None:
    tokenizer = gemma()
    assert Encoder(tokenizer).is_fast
    assert Encoder(tokenizer).encode("the fox  über 漢") == expected(tokenizer, "the fox  über 漢")


@pytest.mark.parametrize("name", USED)
@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=60) | st.lists(st.sampled_from(encoder_module._PIECES), max_size=20).map("".join))
def test_any_text_is_the_tokenizers(name: str, text: str) -> None:
    tokenizer = tokenizer_of(name)
    encoder = Encoder(tokenizer)
    encoder._texts = encoder_module.COMPARED_AT_FIRST  # what it says itself
    assert encoder.encode(text) == expected(tokenizer, text)
    assert encoder.differences == 0


@pytest.mark.parametrize("name", NOT_USED)
def test_kinds_that_cannot_be_proven_are_left_to_the_tokenizer(name: str) -> None:
    tokenizer = tokenizer_of(name)
    assert not is_of_a_known_kind(json.loads(tokenizer.backend_tokenizer.to_str()))
    encoder = Encoder(tokenizer)
    assert not encoder.is_fast
    assert encoder.encode("the quick fox") == expected(tokenizer, "the quick fox")


class Slow:
    """A tokenizer without a serialised form, or with another mind than its serialised form."""

    name_or_path = "slow"
    eos_token_id = 0
    chat_template = None

    def __init__(self, backend: Any = None) -> None:
        self.backend_tokenizer = backend

    def encode(self, text: str, **_: Any) -> list[int]:
        return [7, *text.encode()]


def test_a_slow_tokenizer_encodes_alone() -> None:
    assert not Encoder(Slow()).is_fast
    assert Encoder(Slow()).encode("a") == [7, 97]


def test_a_tokenizer_that_does_more_than_its_form_says_encodes_alone() -> None:
    encoder = Encoder(Slow(tokenizer_of("gpt2").backend_tokenizer))
    assert not encoder.is_fast
    assert encoder.encode("a") == [7, 97]


def test_one_that_was_given_another_mind_is_found_by_the_probes() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("starcoder").backend_tokenizer)
    as_it_was = tokenizer.encode
    tokenizer.encode = lambda text, **options: as_it_was(text.rstrip("\n"), **options)
    encoder_module._PROVEN.clear()
    assert not Encoder(tokenizer).is_fast
    encoder_module._PROVEN.clear()


@pytest.mark.parametrize("change", ["a token", "a pad token", "split"])
def test_what_a_trainer_changes_later_is_noticed_at_once(change: str) -> None:
    backend = Tokenizer.from_str(tokenizer_of("llama 3").backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    encoder = Encoder(tokenizer)
    text = "the <new_tool> fox <|pad|> and <|im_end|>"
    for _ in range(2 * encoder_module.COMPARED_AT_FIRST):
        assert encoder.encode(text) == expected(tokenizer, text)
    match change:
        case "a token":
            tokenizer.add_tokens(["<new_tool>"])
        case "a pad token":
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        case "split":
            tokenizer.split_special_tokens = True
    assert encoder.encode(text) == expected(tokenizer, text)
    assert encoder.is_fast == (change != "split")
    assert encoder.differences == 0


def test_a_tokenizer_that_splits_control_tokens_encodes_alone() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("gpt2").backend_tokenizer)
    tokenizer.split_special_tokens = True
    assert not Encoder(tokenizer).is_fast


def test_truncation_and_padding_of_a_form_are_not_taken_over() -> None:
    backend = Tokenizer.from_str(tokenizer_of("llama 3").backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    encoder = Encoder(tokenizer)
    assert encoder.is_fast
    assert encoder.encode("the quick brown fox " * 9) == expected(tokenizer, "the quick brown fox " * 9)


def test_without_fastokens_the_tokenizer_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "find_spec", lambda name: None)
    assert not Encoder(tokenizer_of("gpt2")).is_fast


class Says:
    """What `fastokens` gives: `ids` as this function makes them."""

    def __init__(self, ids: Callable[[str], list[int]]) -> None:
        self._ids = ids

    def encode(self, text: str) -> Any:
        return type("Encoding", (), {"ids": self._ids(text)})


class Panic(BaseException):
    """As Rust's, which is no `Exception`."""


def panics(text: str) -> list[int]:
    raise Panic(text)


@pytest.mark.parametrize("ids", [lambda text: [1], panics], ids=["wrong ids", "a panic"])
def test_a_difference_ends_its_use_and_is_told_once(ids: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_of("gpt2")
    encoder = Encoder(tokenizer)
    encoder._fast = Says(ids)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert encoder.encode("the fox") == expected(tokenizer, "the fox")
    assert encoder.differences == 1
    assert not encoder.is_fast
    assert len(caplog.records) == 1
    assert "the tokenizer encodes from now on" in caplog.text


def test_one_text_in_so_many_is_compared() -> None:
    tokenizer, encoded = tokenizer_of("gpt2"), []
    encoder = Encoder(tokenizer)
    encoder._slowly = lambda text: encoded.append(text) or expected(tokenizer, text)  # type: ignore[method-assign]
    for _ in range(encoder_module.COMPARED_AT_FIRST + 10 * encoder_module.COMPARED_AFTERWARDS):
        encoder.encode("the fox")
    assert len(encoded) == encoder_module.COMPARED_AT_FIRST + 10


@pytest.mark.parametrize("character", ["\U00020000", "\U000e0001", "\U00010380"])
def test_a_character_that_was_never_probed_is_left_to_the_tokenizer(character: str) -> None:
    tokenizer = tokenizer_of("gpt2")
    encoder = Encoder(tokenizer)
    encoder._fast = Says(panics)
    assert encoder.encode(f"the {character}") == expected(tokenizer, f"the {character}")
    assert encoder.is_fast


def test_half_a_character_is_refused_as_the_tokenizer_refuses_it() -> None:
    tokenizer = tokenizer_of("gpt2")
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - whatever it is
        expected(tokenizer, "\ud800")
    encoder = Encoder(tokenizer)
    with pytest.raises(theirs.type):
        encoder.encode("\ud800")
    assert encoder.is_fast


def test_a_format_encodes_with_it() -> None:
    chat_format = load_format(tokenizer_of("qwen"))
    assert chat_format.encoder.is_fast
    assert chat_format.encoder.differences == 0
    assert list(chat_format.encode("the fox<|im_end|>")) == expected(tokenizer_of("qwen"), "the fox<|im_end|>")
