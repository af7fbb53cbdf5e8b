"""Text to ids: with a faster encoder than the tokenizer's own, where it is proven to write the same ids.

`fastokens` is made of the tokenizer's serialised form. It is used for byte-pair encodings of the kinds below, and only
once it gave the tokenizer's ids on every probe: each added token in each surrounding, and each kind of character. While
it runs, a sample of what it encodes is encoded by the tokenizer too. One difference, and the tokenizer does the work
from then on. A character that was never probed is left to the tokenizer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from importlib.util import find_spec
from itertools import product
from random import Random
from typing import Any, Final, Protocol

import orjson

from gymlink.align.base import Tokenizer

logger = logging.getLogger(__name__)

COMPARED_AT_FIRST: Final = 128
"""Texts that are all compared: those with which a chat template is proven, and the first calls."""
COMPARED_AFTERWARDS: Final = 64
"""One in so many is compared."""

MAX_PROVEN: Final = 16
"""Tokenizers whose encoders are kept: more than a process has."""
MAX_ADDED: Final = 256
"""Added tokens that are probed; of more, the first ones and one of each kind."""
MIXED_TEXTS: Final = 512

_PROVEN: dict[tuple[bytes, type], FastEncoder | None] = {}
_NORMALIZERS: Final = frozenset({"NFC", "Replace", "Sequence"})
_PRE_TOKENIZERS: Final = frozenset({"ByteLevel", "Digits", "Sequence", "Split"})
_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Every character of these, or one in so many where they are all alike.
_PROBED: Final = (
    (0x0000, 0x3400, 1),
    (0x3400, 0xA000, 37),  # ideographs
    (0xA000, 0xAC00, 1),
    (0xAC00, 0xD7A4, 37),  # hangul
    (0xD7A4, 0xD800, 1),
    (0xE000, 0xF900, 61),  # for private use
    (0xF900, 0x10000, 1),
    (0x1D400, 0x1D800, 1),  # mathematical letters
    (0x1F000, 0x1FB00, 1),  # emoji
)
_UNPROBED: Final = re.compile("[^\u0000-\ud7ff\ue000-\uffff\U0001d400-\U0001d7ff\U0001f000-\U0001faff]")
_AROUND: Final = ("", " ", "  ", "\n", "\n\n ", "\t", "a", "A", "1", "'s", "é", "漢", ".", "</", "_")
_PIECES: Final = (
    *_AROUND,
    *("the", "The", "THE", "camelCase", "don't", "I'LL", "0", "12", "1234567", "3.14e-9", "::", "==>", "\\n", '"'),
    *(
        "{}",
        "<|",
        "|>",
        "<think>",
        "</s>",
        "[INST]",
        "    ",
        "        ",
        "\r\n",
        "\n\n\n  ",
        "\u00a0",
        "\u3000",
    ),
    *("\u200b", "\u200d", "\ufeff", "\ufffd", "\x00", "\x7f", "über", "e\u0301", "\ufb01", "\u01c4", "\u017f", "ß"),
    *(
        "\u2460",
        "½",
        "\u0663",
        "\U0001d49c",
        "▁",
        "Ġ",
        "日本語",
        "한국어",
        "中文。",
        "العربية",
        "हिन्दी",
        "ไทย",
        "Привет",
    ),
    *("\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd"),
)


class FastEncoder(Protocol):
    """The part of `fastokens.Tokenizer` that is needed."""

    def encode(self, text: str, /) -> Any: ...


class Encoder:
    """Encodes text as this tokenizer does, with nothing added around it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._fast = proven_encoder(tokenizer)
        self._proven_for = None if self._fast is None else _state(tokenizer)
        self._texts = 0
        self.differences = 0
        """Texts that the faster encoder wrote otherwise, after which it was not used any more: 0 or 1."""

    @property
    def is_fast(self) -> bool:
        """Whether the faster encoder does the work."""
        return self._fast is not None

    def encode(self, text: str) -> list[int]:
        """The tokenizer's ids for this text. Control tokens are read where it spells them."""
        if self._fast is not None and _state(self._tokenizer) != self._proven_for:
            self._fast, self._proven_for = proven_encoder(self._tokenizer), _state(self._tokenizer)
        fast = self._fast
        if fast is None or not (text.isascii() or _UNPROBED.search(text) is None):
            return self._slowly(text)
        self._texts += 1
        ids = _tried(fast, text)
        if ids is None or self._texts <= COMPARED_AT_FIRST or self._texts % COMPARED_AFTERWARDS == 0:
            return self._compared(text, ids)
        return ids

    def _compared(self, text: str, ids: list[int] | None) -> list[int]:
        expected = self._slowly(text)
        if ids != expected and self._fast is not None:
            self._fast = None
            self.differences += 1
            logger.error(
                "fastokens wrote other ids than the tokenizer %r for a text of %d characters that begins with %r; the "
                "tokenizer encodes from now on. Earlier texts were compared in part only; a policy is trained on the "
                "ids that it saw. Please report this.",
                self._tokenizer.name_or_path,
                len(text),
                text[:80],
            )
        return expected

    def _slowly(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def _state(tokenizer: Any) -> tuple[int, Any]:
    """What changes where a trainer adds tokens to a tokenizer that is loaded, or has it split control tokens."""
    return len(tokenizer), getattr(tokenizer, "split_special_tokens", False)


def proven_encoder(tokenizer: Tokenizer) -> FastEncoder | None:
    """A faster encoder that wrote the tokenizer's ids on every probe; None where there is none."""
    serialize = getattr(getattr(tokenizer, "backend_tokenizer", None), "to_str", None)
    encodes_itself = not str(getattr(type(tokenizer).encode, "__module__", "")).startswith("transformers.")
    if serialize is None or encodes_itself or getattr(tokenizer, "split_special_tokens", False):
        return None
    if find_spec("fastokens") is None:
        return None
    serialized = str(serialize())
    known = (blake2b(serialized.encode()).digest(), type(tokenizer))
    if known not in _PROVEN:
        if len(_PROVEN) >= MAX_PROVEN:
            _PROVEN.clear()
        form = orjson.loads(serialized)
        fast = _made(form) if is_of_a_known_kind(form) else None
        _PROVEN[known] = fast if fast is not None and _agrees(tokenizer, form, fast) else None
    return _PROVEN[known]


def is_of_a_known_kind(form: Mapping[str, Any]) -> bool:
    """Whether this serialised tokenizer is a byte-pair encoding that writes a text the same wherever it stands.

    Not so with SentencePiece's legacy spaces, which put one before whatever is encoded.
    """
    model = form["model"]
    return (
        model.get("type", "BPE") == "BPE"
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and set(_parts(form.get("normalizer"))) <= _NORMALIZERS
        and set(_parts(form.get("pre_tokenizer"))) <= _PRE_TOKENIZERS
    )


def _parts(component: Mapping[str, Any] | None) -> Iterator[str]:
    """The types of a component of a serialised tokenizer, and of those that it is a sequence of."""
    if component is not None:
        yield str(component.get("type"))
        for part in (*component.get("normalizers", ()), *component.get("pretokenizers", ())):
            yield from _parts(part)


def _made(form: Mapping[str, Any]) -> FastEncoder | None:
    from fastokens import Tokenizer as FastTokenizer

    # A call asks for neither, and transformers switches them off for it.
    whole = orjson.dumps({**form, "truncation": None, "padding": None}).decode()
    try:
        encoder: FastEncoder = FastTokenizer.from_json_str(whole)
    except Exception as error:  # noqa: BLE001 - it names what it does not support, in any type of error
        logger.info("fastokens does not take this tokenizer: %s", error)
        return None
    return encoder


def _tried(fast: FastEncoder, text: str) -> list[int] | None:
    """Its ids; None where it fails. A panic of its Rust code is no `Exception`."""
    try:
        return list(fast.encode(text).ids)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # noqa: BLE001
        return None


def _agrees(tokenizer: Tokenizer, form: Mapping[str, Any], fast: FastEncoder) -> bool:
    for text in probes(form):
        if _tried(fast, text) != list(tokenizer.encode(text, add_special_tokens=False)):
            logger.info("fastokens writes %r otherwise than the tokenizer, which encodes alone", text[:80])
            return False
    return True


# -- probes ------------------------------------------------------------------------------------------------------


def probes(form: Mapping[str, Any]) -> Iterator[str]:
    """Texts that show how a tokenizer of this form writes; the same ones with each call."""
    yield from map("".join, product(_AROUND, _AROUND))
    yield from _added(form.get("added_tokens") or ())
    yield from _mixed(Random(0))  # noqa: S311 - the same texts each time
    characters = [chr(code) for first, last, step in _PROBED for code in range(first, last, step)]
    for at in range(0, len(characters), 64):
        yield "".join(f"x{one}y {one}1{one}\n" for one in characters[at : at + 64])


def _added(tokens: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Added tokens, one of each kind in all surroundings and the others in a few, whole and in parts."""
    kinds: dict[tuple[Any, ...], str] = {}
    for token in tokens:
        text = str(token["content"])
        kinds.setdefault((*(token.get(name) for name in _FLAGS), text.isalnum(), text.strip() == text), text)
    for text in kinds.values():
        yield from (f"{before}{text}{after}" for before, after in product(_AROUND, _AROUND))
    texts = [str(token["content"]) for token in tokens][:MAX_ADDED]
    for text, other in zip(texts, texts[1:] + texts[:1], strict=True):
        yield f"a{text}b {text} {text}\n{text}{other} {other}{text}  {text[:-1]} {text[1:]}{text.upper()}{text.lower()}"


def _mixed(random: Random) -> Iterator[str]:
    for _ in range(MIXED_TEXTS):
        yield "".join(random.choice(_PIECES) for _ in range(random.randint(1, 40)))
