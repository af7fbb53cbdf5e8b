"""`gymlink prompts openrlhf`: a prompt for each row, whole, as OpenRLHF reads it, and what is said of rows that cannot
work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from typer.testing import CliRunner

from gymlink.cli import app
from gymlink.errors import ConfigError
from gymlink_openrlhf.prompts import write_prompts

AGENT = {"type": "responses_api_agents", "name": "door"}
ROW = {"responses_create_params": {"input": [{"role": "user", "content": "go"}]}, "agent_ref": AGENT}


def rows_file(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_row_travels_whole(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "turns": 3, "deep": {"a": [1, None, {"b": "ü"}]}}]
    path = write_prompts(rows_file(tmp_path, *rows), tmp_path / "new" / "prompts.jsonl")
    assert path == tmp_path / "new" / "prompts.jsonl"
    prompts = [json.loads(line) for line in path.read_text().splitlines()]
    assert [set(prompt) for prompt in prompts] == [{"input", "label", "datasource"}] * 2
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        assert json.loads(prompt["label"]) == {**row, "gymlink": {"index": index, "split": "train"}}
        assert prompt["input"] == "door: go"
        assert prompt["datasource"] == "door"
    assert [path.name for path in path.parent.iterdir()] == ["prompts.jsonl"]


def test_rows_for_evaluation_say_so(tmp_path: Path) -> None:
    path = write_prompts(rows_file(tmp_path, ROW), tmp_path / "prompts.jsonl", True)
    assert json.loads(json.loads(path.read_text())["label"])["gymlink"] == {"index": 0, "split": "val"}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("plain", "plain"),
        ([{"role": "system", "content": "be"}, {"role": "user", "content": "do"}], "do"),
        ([{"role": "user", "content": "first"}, {"role": "assistant", "content": "so"}], "first"),
        ([{"role": "user", "content": [{"type": "input_text", "text": "two"}]}], "two"),
        ([{"role": "user", "content": ""}], ""),
        ([{"role": "system", "content": "be"}], "be"),
    ],
)
def test_the_prompt_is_what_the_user_says_last(given: Any, text: str, tmp_path: Path) -> None:
    row = {"responses_create_params": {"input": given}, "agent_ref": AGENT}
    path = write_prompts(rows_file(tmp_path, row), tmp_path / "prompts.jsonl")
    assert json.loads(path.read_text())["input"] == f"door: {text}"


def test_two_agents_never_share_a_prompt(tmp_path: Path) -> None:
    """OpenRLHF finds by the prompt's text which data source an evaluated sample belongs to."""
    rows = [
        ROW,
        {**ROW, "agent_ref": {**AGENT, "name": "gate"}},
        {key: ROW[key] for key in ["responses_create_params"]},
    ]
    path = write_prompts(rows_file(tmp_path, *rows), tmp_path / "prompts.jsonl")
    prompts = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(prompt["input"], prompt["datasource"]) for prompt in prompts] == [
        ("door: go", "door"),
        ("gate: go", "gate"),
        ("gym: go", "gym"),
    ]


def test_the_library_that_openrlhf_reads_it_with_changes_nothing(tmp_path: Path) -> None:
    """Rows of two environments have fields of one name and different types."""
    rows = [{**ROW, "answer": 1, "when": "2026-01-01"}, {**ROW, "answer": {"of": ["x"]}}, {**ROW, "more": None}]
    path = write_prompts(rows_file(tmp_path, *rows), tmp_path / "prompts.jsonl")
    read = load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "cache"))["train"]
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [dict(sample) for sample in read] == written


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([ROW, {}], r"rows.jsonl:2: the key 'responses_create_params' is missing"),
        ([ROW, {**ROW, "agent_ref": "door"}], r"rows.jsonl:2: 'agent_ref' must be an object"),
        ([ROW, ROW, {**ROW, "gymlink": 1}], r"rows.jsonl: row 3 has a key 'gymlink'"),
        ([], r"rows.jsonl: no rows"),
    ],
    ids=["no-row", "no-agent", "our-key", "empty"],
)
def test_rows_that_cannot_work_leave_no_file(rows: list[Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        write_prompts(rows_file(tmp_path, *rows), tmp_path / "out" / "prompts.jsonl")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["a,b", "a@b"])
def test_a_path_that_openrlhf_reads_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*meaning of its own"):
        write_prompts(rows_file(tmp_path, ROW), tmp_path / name / "prompts.jsonl")
    assert not (tmp_path / name).exists()


def test_rows_are_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_file(tmp_path, ROW)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="over the rows"):
        write_prompts(rows, Path("rows.jsonl"))
    assert json.loads(rows.read_text()) == ROW


@pytest.mark.parametrize(
    ("options", "name", "split"),
    [
        ([], "rows.openrlhf.jsonl", "train"),
        (["--eval"], "rows.openrlhf-eval.jsonl", "val"),
        (["--output", "here.jsonl"], "here.jsonl", "train"),
    ],
    ids=["train", "eval", "output"],
)
def test_the_command_prints_the_files_path(
    options: list[str], name: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["prompts", "openrlhf", str(rows_file(tmp_path, ROW)), *options])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / name}\n"
    assert json.loads(json.loads((tmp_path / name).read_text())["label"])["gymlink"]["split"] == split
