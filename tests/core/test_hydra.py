import datetime
from typing import Any

import pytest

from gymlink.errors import ConfigError
from gymlink.hydra import hydra_override, hydra_value


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "null"),
        (True, "true"),
        (3, "3"),
        (0.5, "0.5"),
        ("a, b", "'a, b'"),
        ("12", "'12'"),
        ("it's", r"'it\'s'"),
        ("ends\\", r"'ends\\'"),
        (["a", 1], "['a',1]"),
        ([{"a": "b"}], "[{a:'b'}]"),
        ({}, "{}"),
    ],
)
def test_values_in_hydra_grammar(value: Any, written: str) -> None:
    assert hydra_value(value) == written


def test_a_mapping_becomes_one_override_for_each_leaf() -> None:
    assert list(hydra_override("a", {"b": 1, "c": {"d": "x"}})) == ["++a.b=1", "++a.c.d='x'"]


def test_a_value_that_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match="date"):
        hydra_value(datetime.date(2026, 1, 1))


def test_how_says_whether_a_path_may_be_new() -> None:
    assert list(hydra_override("a", {"b": 1}, how="")) == ["a.b=1"]
    assert list(hydra_override("a", 1, how="+")) == ["+a=1"]
