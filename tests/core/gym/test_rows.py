import json
from pathlib import Path
from typing import Any

import pytest

from gymlink.errors import ConfigError
from gymlink.gym import check_rows, read_rows, readable_messages

GOOD: dict[str, Any] = {"responses_create_params": {"input": [{"role": "user", "content": "hi"}]}}


def named(agent: str) -> dict[str, Any]:
    return {**GOOD, "agent_ref": {"type": "responses_api_agents", "name": agent}}


def write(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_the_only_agent_is_filled_in(tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path, {**GOOD, "turns": 2}), agents=["a"])
    assert row == {**GOOD, "turns": 2, "agent_ref": {"type": "responses_api_agents", "name": "a"}}


def test_several_environments_in_one_file(tmp_path: Path) -> None:
    path = write(tmp_path, named("a"), "", named("b"), named("a"))
    assert check_rows(path, ["a", "b"]) == {"a": 2, "b": 1}


def test_without_agents_rows_stay_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, named("b"))
    assert list(read_rows(path)) == [GOOD, named("b")]
    assert check_rows(path) == {"": 1, "b": 1}


def test_reading_is_lazy(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, named("a"), "not JSON"), agents=["a"])
    assert next(rows) == named("a")
    with pytest.raises(ConfigError, match="not JSON"):
        next(rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ([1], "expected an object, got a list"),
        ({"input": "hi"}, r"'responses_create_params' is missing \(found: input\)"),
        ({"responses_create_params": None}, "must be an object, got null"),
        ({"responses_create_params": {}}, "'responses_create_params.input' is missing"),
        ({"responses_create_params": {"input": []}}, "is missing or empty"),
        (GOOD, r"'agent_ref' is missing, and 2 agents run \(keypad_agent, stockroom_agent\)"),
        ({**GOOD, "agent_ref": "keypad_agent"}, "must be an object with a 'name', got 'keypad_agent'"),
        (named("keypad"), r"no agent 'keypad' runs; running: .*Did you mean 'keypad_agent'\?"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path, named("keypad_agent"), line)
    with pytest.raises(ConfigError, match=rf"rows\.jsonl:2: .*{message}"):
        check_rows(path, ["keypad_agent", "stockroom_agent"])


def test_a_file_that_is_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read the rows .*No such file"):
        check_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(ConfigError, match="no rows"):
        check_rows(write(tmp_path, ""))


def test_the_rows_of_the_example_environments_are_good() -> None:
    root = Path(__file__).parents[3] / "examples/environments/resources_servers"
    files = sorted(root.glob("*/data/*.jsonl"))
    assert len(files) >= 5
    for file in files:
        assert list(check_rows(file, ["keypad_agent", "stockroom_agent"])) == [f"{file.parents[1].name}_agent"]


def test_an_input_is_readable_whatever_it_holds() -> None:
    odd = [3, "text", {"role": "user", "content": [{"text": "a"}, {"text": None}, "b"]}, {"type": "x", "content": None}]
    messages = readable_messages({"responses_create_params": {"input": odd}})
    assert [message["content"] for message in messages] == ["3", "text", "ab", '{"type":"x","content":null}']
    assert [message["role"] for message in messages] == ["user", "user", "user", "x"]
    assert readable_messages({"responses_create_params": {"input": "plain"}}) == [{"role": "user", "content": "plain"}]
    assert readable_messages({"responses_create_params": {"input": []}}) == [{"role": "user", "content": ""}]
