"""Gym's own capture of token ids, as files of its format; files that a real Gym wrote are read in tests/contract."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from gymlink.gym import capture_folder, captured_ids
from gymlink.types import CallIds


def entry(call: str, prompt: list[int], completion: list[int], parent: str | None = None) -> bytes:
    body = {"model_call_id": call, "prompt_token_ids": prompt, "generation_token_ids": completion}
    return orjson.dumps({**body, "parent_call_id": parent, "prompt_is_delta": parent is not None})


def test_each_call_is_told_whole(tmp_path: Path) -> None:
    lines = [entry("a", [1, 2], [3]), entry("b", [4], [5, 6], "a"), b"", entry("c", [7], [], "b"), entry("d", [9], [8])]
    (tmp_path / "0.x.tokens.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    calls = captured_ids(tmp_path, "0.x")
    assert [(call.prompt_ids, call.completion_ids) for call in calls] == [
        ((1, 2), (3,)),
        ((1, 2, 3, 4), (5, 6)),
        ((1, 2, 3, 4, 5, 6, 7), ()),
        ((9,), (8,)),
    ]
    assert calls[2] == CallIds((7,), (), extends=calls[1]), "a call holds what it adds"


def test_a_rollout_that_was_not_captured(tmp_path: Path) -> None:
    assert captured_ids(tmp_path, "0.x") == []
    assert captured_ids(tmp_path / "nowhere", "0.x") == []


@pytest.mark.parametrize(
    ("config", "folder"),
    [
        ({}, None),
        ({"token_id_capture": {"enabled": False, "dir": "/a"}}, None),
        ({"token_id_capture": {"enabled": True, "dir": "/a"}}, Path("/a")),
        ({"token_id_capture": {"enabled": True}, "model_call_capture_dir": "/b"}, Path("/b")),
        ({"token_id_capture": {"enabled": True, "dir": "/a", "sink": "x:Y"}}, None),
        ({"token_id_capture": {"enabled": True}}, None),
    ],
)
def test_where_a_gym_keeps_its_captures(config: dict[str, Any], folder: Path | None) -> None:
    assert capture_folder(config) == folder
