"""Errors are raised in one process and read in another."""

import pickle

import pytest

from gymlink import errors
from gymlink.engines.connection import AnsweredError
from gymlink.errors import ContextOverflowError, GymlinkError, GymRequestError

MADE = {
    ContextOverflowError: ContextOverflowError(10, 5),
    GymRequestError: GymRequestError("no answer", kind="http", status=500),
    AnsweredError: AnsweredError("it says no", status=400, said="no"),
}


def kinds(base: type[GymlinkError]) -> list[type[GymlinkError]]:
    return [base, *(kind for one in base.__subclasses__() for kind in kinds(one))]


@pytest.mark.parametrize("kind", kinds(GymlinkError), ids=lambda kind: kind.__name__)
def test_an_error_is_the_same_in_another_process(kind: type[GymlinkError]) -> None:
    error = MADE.get(kind) or kind("what happened")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


def test_every_error_is_in_the_drawing() -> None:
    drawn = errors.__doc__ or ""
    assert all(kind.__name__ in drawn for kind in kinds(GymlinkError) if kind.__module__ == errors.__name__)
