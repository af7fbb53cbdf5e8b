"""Numbers of one kind in a row, packed: four bytes for a token id and eight for a logprob, not an object for each.

A packed sequence reads as the tuple of its numbers, equals it and hashes as it does, and never changes. What grows with
a rollout is held in these, so a token costs what it must; plain tuples and lists are made where a trainer takes them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, ClassVar, Generic, Self, TypeVar, overload

import orjson

N = TypeVar("N", int, float)


class Packed(Sequence[N], Generic[N]):
    """The base: a subclass names the type of its numbers as `array` does.

    Raises:
        ValueError: made of what is not a number of its kind, or of one that is out of its range.
    """

    __slots__ = ("_numbers",)
    _typecode: ClassVar[str]
    _numbers: array[N]

    def __init__(self, numbers: Iterable[N] = ()) -> None:
        if isinstance(numbers, Packed):
            numbers = numbers._numbers
        try:
            if isinstance(numbers, str | bytes | bytearray):  # which an array would take for its memory
                raise TypeError(f"numbers are needed, not {type(numbers).__name__}")  # noqa: TRY301 - told as the others
            # An array that grows by what an iterator gives has room to spare; one of a list has none.
            self._numbers = array(self._typecode, numbers if isinstance(numbers, Sized) else list(numbers))
        except (TypeError, OverflowError) as error:
            raise ValueError(f"{type(self).__name__} cannot hold what it was given: {error}.") from error

    @classmethod
    def joined(cls, parts: Iterable[Packed[N]]) -> Self:
        """All of them, one after the other. Takes the time of copying bytes."""
        whole = cls()
        whole._numbers.frombytes(b"".join([part._numbers for part in parts]))
        return whole

    @classmethod
    def filled(cls, number: N, times: int) -> Self:
        """The same number over and over."""
        made = cls((number,))
        made._numbers *= times
        return made

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: Any) -> Any:
        """A list of numbers where it is read from JSON."""
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(cls)

    def tolist(self) -> list[N]:
        """The numbers as a plain list."""
        return self._numbers.tolist()

    def tobytes(self) -> bytes:
        """The numbers as the machine holds them."""
        return self._numbers.tobytes()

    def startswith(self, prefix: Packed[N]) -> bool:
        """Whether it begins with these."""
        return self._numbers[: len(prefix)] == prefix._numbers

    def _of(self, numbers: array[N]) -> Self:
        made = type(self)()
        made._numbers = numbers
        return made

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[N]:
        return iter(self._numbers)

    @overload
    def __getitem__(self, at: int) -> N: ...
    @overload
    def __getitem__(self, at: slice) -> Self: ...
    def __getitem__(self, at: int | slice) -> N | Self:
        return self._of(self._numbers[at]) if isinstance(at, slice) else self._numbers[at]

    def __contains__(self, number: object) -> bool:
        return number in self._numbers

    def count(self, number: Any) -> int:
        """How many of them are this number."""
        return self._numbers.count(number)

    def __add__(self, other: Iterable[N]) -> Self:
        return self._of(self._numbers + self._alike(other))

    def __radd__(self, other: Iterable[N]) -> Self:
        return self._of(self._alike(other) + self._numbers)

    def _alike(self, other: Iterable[N]) -> array[N]:
        return other._numbers if type(other) is type(self) else type(self)(other)._numbers

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Packed):
            return self._numbers == other._numbers
        return len(self) == len(other) and tuple(self._numbers) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._numbers))

    def __repr__(self) -> str:
        return repr(tuple(self._numbers))


class TokenIds(Packed[int]):
    """Token ids, of 32 bits."""

    __slots__ = ()
    _typecode = "i"


class Logprobs(Packed[float]):
    """Natural logarithms of probabilities, in the precision of Python's own numbers."""

    __slots__ = ()
    _typecode = "d"


class Mask(Packed[int]):
    """1 for each token to train, else 0."""

    __slots__ = ()
    _typecode = "b"


def to_json(value: Any) -> bytes:
    """`value` as JSON, in which packed numbers are lists, and no object is made for any of them."""
    return orjson.dumps(value, default=_as_numpy, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY)


def _as_numpy(value: Any) -> Any:
    import numpy as np

    if isinstance(value, Packed):
        return np.asarray(value._numbers)
    raise TypeError


def pack(value: object, **fields: type[Packed[Any]]) -> None:
    """For a frozen dataclass that is made of any sequences of numbers: hold these fields packed.

    Raises:
        ValueError: one holds what is no number of its kind.
    """
    for name, kind in fields.items():
        given = getattr(value, name)
        if type(given) is not kind:
            object.__setattr__(value, name, kind(given))
