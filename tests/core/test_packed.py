"""A packed sequence is a tuple of its numbers to whoever reads it, and takes the room of its numbers."""

from __future__ import annotations

import json
import pickle
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from gymlink.packed import Logprobs, Mask, Packed, TokenIds

ids = st.lists(st.integers(0, 2**31 - 1), max_size=8).map(tuple)
logprobs = st.lists(st.floats(allow_nan=False), max_size=8).map(tuple)
slices = st.slices(8)


@given(ids, ids, slices)
def test_it_reads_as_a_tuple(one: tuple[int, ...], other: tuple[int, ...], part: slice) -> None:
    packed = TokenIds(one)
    assert packed == one
    assert one == packed
    assert (packed == other) == (one == other)
    assert (packed == TokenIds(other)) == (one == other)
    assert hash(packed) == hash(one)
    assert repr(packed) == repr(one)
    assert [*packed] == packed.tolist() == [*one]
    assert packed[part] == one[part]
    assert isinstance(packed[part], TokenIds)
    assert packed + other == other.__class__(one) + other == one + TokenIds(other)
    assert TokenIds.joined([packed, TokenIds(other), packed]) == one + other + one
    assert packed.startswith(TokenIds(other)) == (one[: len(other)] == other)
    assert all(number in packed for number in one)
    assert pickle.loads(pickle.dumps(packed)) == one


@given(logprobs)
def test_logprobs_keep_their_precision(given: tuple[float, ...]) -> None:
    assert Logprobs(given) == given
    assert Logprobs(json.loads(json.dumps(given))) == given


def test_numbers_of_other_kinds_are_told_apart() -> None:
    assert TokenIds((1, 2)) != [1, 2]
    assert TokenIds() == () == TokenIds.filled(7, 0)
    assert Mask.filled(1, 3) == (1, 1, 1)
    assert Mask((0, 1, 1)).count(1) == 2


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        (TokenIds, [2**31]),
        (TokenIds, [-(2**31) - 1]),
        (TokenIds, [1.5]),
        (TokenIds, ["1"]),
        (TokenIds, None),
        (Logprobs, [None]),
        (Logprobs, ["-1"]),
    ],
)
def test_what_is_no_number_of_its_kind_is_refused(kind: type[Packed], numbers: object) -> None:
    with pytest.raises(ValueError, match=kind.__name__):
        kind(numbers)


def test_a_number_takes_its_own_room() -> None:
    def room(packed: Packed) -> int:
        return sys.getsizeof(packed) + sys.getsizeof(packed._numbers)

    assert room(TokenIds(range(100_000))) / 100_000 < 4.2 * 1.13  # an array that grew has some to spare
    assert room(Logprobs([-0.5] * 100_000)) / 100_000 < 8.2


def test_it_comes_from_json() -> None:
    assert TypeAdapter(TokenIds).validate_json("[1, 2]") == (1, 2)
    with pytest.raises(ValueError, match="TokenIds"):
        TypeAdapter(TokenIds).validate_json('["x"]')
