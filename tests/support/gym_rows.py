"""Rows for the environments of tests/environments: an agent that rewrites its history, and a server that fails."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ENVIRONMENTS = Path(__file__).parents[1] / "environments"
CONFIGS = ("resources_servers/flaky/configs/flaky.yaml", "responses_api_agents/forgetful/configs/forgetful.yaml")

Row = dict[str, Any]


def write_gym(folder: Path, **sections: Any) -> Path:
    """A gym.yaml with these environments, and with more sections."""
    gym = {"config_paths": [str(ENVIRONMENTS / config) for config in CONFIGS], "root": str(ENVIRONMENTS)}
    path = folder / "gym.yaml"
    path.write_text(yaml.safe_dump({"gym": gym, **sections}))
    return path


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def forgetful(number: int, forget_every: int, *, name: str = "story") -> Row:
    return _row("forgetful_agent", f"{name} {number}", forget_every=forget_every, bonus=number / 10)


def flaky(number: int, fail_every: int, *, name: str = "visit") -> Row:
    return _row("flaky_agent", f"{name} {number}", fail_every=fail_every, bonus=number / 10)


def _row(agent: str, text: str, **fields: Any) -> Row:
    content = [{"role": "user", "content": text}]
    return {"responses_create_params": {"input": content}, "agent_ref": {"name": agent}, **fields}


MIXED = [
    row
    for number in range(8)
    for row in (forgetful(number, 2), flaky(number, 5), forgetful(number, 1), flaky(number, 5))
]
"""Rows of which every four give groups with all rollouts scored, with failed ones, and with rewritten ones."""
EXAM = [forgetful(1, 1, name="exam"), flaky(1, 2, name="exam"), flaky(2, 2, name="exam"), forgetful(2, 0, name="exam")]
