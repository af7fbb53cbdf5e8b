"""Rows to prompts and back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import concatenate_datasets, load_from_disk
from trl.data_utils import is_conversational

from gymlink.errors import ConfigError
from gymlink_trl.dataset import ROW_KEY, gym_dataset, load_rows, row_reference


def row(given: Any, agent: str = "one") -> dict[str, Any]:
    return {"responses_create_params": {"input": given}, "agent_ref": {"name": agent}, "note": "é" * 50}


def write(path: Path, *rows: dict[str, Any], blank: str = "") -> Path:
    path.write_text(blank + "\n".join(json.dumps(one, ensure_ascii=False) + blank for one in rows) + "\n")
    return path


def test_the_prompt_is_for_people_and_leads_back_to_the_row(tmp_path: Path) -> None:
    rows = [
        row("just text"),
        row([{"role": "developer", "content": "be brief"}, {"role": "user", "content": [{"text": "in parts"}]}]),
        row([{"type": "function_call", "name": "f", "arguments": "{}"}], agent="two"),
    ]
    dataset = gym_dataset(write(tmp_path / "rows.jsonl", *rows, blank="\n"))
    assert [[(one["role"], one["content"]) for one in prompt] for prompt in dataset["prompt"]] == [
        [("user", "just text")],
        [("developer", "be brief"), ("user", "in parts")],
        [("function_call", json.dumps(rows[2]["responses_create_params"]["input"][0], separators=(",", ":")))],
    ]
    assert all(is_conversational(one) for one in dataset)
    assert load_rows(list(dataset["prompt"])) == rows


def test_whatever_an_input_holds_it_can_be_read(tmp_path: Path) -> None:
    odd = [
        [{"role": "user", "content": [{"type": "input_text", "text": None}, {"text": "seen"}, "plain", 3]}],
        [{"role": "user", "content": None}],
    ]
    dataset = gym_dataset(write(tmp_path / "rows.jsonl", *map(row, odd)))
    assert [prompt[0]["content"] for prompt in dataset["prompt"]] == ["seenplain", '{"role":"user","content":null}']


def test_the_reference_survives_what_datasets_and_the_trainer_do(tmp_path: Path) -> None:
    first = [row(f"first {index}") for index in range(5)]
    second = [row([{"role": "user", "content": f"second {index}"}], agent="two") for index in range(5)]
    dataset = concatenate_datasets(
        [gym_dataset(write(tmp_path / "a b@c:d.jsonl", *first)), gym_dataset(write(tmp_path / "b.jsonl", *second))]
    )
    dataset.shuffle(seed=3).map(lambda one: {"length": len(one["prompt"])}).save_to_disk(tmp_path / "saved")
    prompts = copy.deepcopy(list(load_from_disk(tmp_path / "saved")["prompt"]))
    assert sorted(json.dumps(one) for one in load_rows(prompts)) == sorted(json.dumps(one) for one in first + second)


def test_repeated_prompts_share_a_row_and_a_reference(tmp_path: Path) -> None:
    dataset = gym_dataset(write(tmp_path / "rows.jsonl", row("a"), row("b")))
    one, two = dataset["prompt"]
    a, again, b = load_rows([one, one, two])
    assert a is again
    assert a != b
    assert row_reference(one) == row_reference(copy.deepcopy(one)) != row_reference(two)


def test_a_large_row_makes_a_small_prompt(tmp_path: Path) -> None:
    large = row("small")
    large["responses_create_params"]["tools"] = [{"name": "x" * 100_000}]
    dataset = gym_dataset(write(tmp_path / "rows.jsonl", large))
    assert len(str(dataset["prompt"][0])) < 500 + len(str(tmp_path))
    assert load_rows(list(dataset["prompt"])) == [large]


def test_a_file_that_changed_or_went_is_noticed(rows_file: Callable[..., Path]) -> None:
    path = rows_file("well", "well")
    prompts = list(gym_dataset(path)["prompt"])
    path.write_text(path.read_text().replace("door 1", "door 7"))
    load_rows(prompts[:1])
    with pytest.raises(ConfigError, match="has changed"):
        load_rows(prompts)
    path.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        load_rows(prompts)


@pytest.mark.parametrize("prompt", ["text", [], [{"role": "user", "content": "hi"}], [{"role": "user", ROW_KEY: None}]])
def test_a_prompt_of_another_origin_is_refused(prompt: Any) -> None:
    with pytest.raises(ConfigError, match="gym_dataset"):
        load_rows([prompt])


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl"):
        gym_dataset(path)
