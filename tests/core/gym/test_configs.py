import datetime
from typing import Any

import pytest

from gymlink.errors import ConfigError
from gymlink.gym.configs import hydra_override, hydra_value, server_instances


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


def test_a_value_that_gym_cannot_take() -> None:
    with pytest.raises(ConfigError, match="date"):
        hydra_value(datetime.date(2026, 1, 1))


def test_servers_are_told_from_other_settings() -> None:
    server = {"entrypoint": "app.py", "port": 1}
    config = {
        "keypad": {"resources_servers": {"keypad": server}},
        "head_server": {"host": "h", "port": 2},
        "policy_model_name": "policy",
        "empty": {},
        "odd": {"a": {"b": {"c": 1}}},
    }
    assert list(server_instances(config)) == [("keypad", "resources_servers", "keypad", server)]
