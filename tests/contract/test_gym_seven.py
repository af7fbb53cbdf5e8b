"""NeMo Gym 0.7.0's own checks of what this gateway answers, made by its real servers.

Gym 0.7 can ask for a prompt that starts with the ids of the turn before, and refuses an answer without the proof that
it does; it compares ids that it is told in two places; and it captures the ids of agents that hand back none.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from uv import find_uv_bin

from gym_batches import ScriptedPolicy, collect, link_servers, row, rows_of, session_over, told
from gymlink.errors import ConfigError
from gymlink.gym import find_interpreter
from gymlink.gym.install import clean_environment
from gymlink.session import Session
from gymlink.types import RolloutStatus

pytestmark = [pytest.mark.slow, pytest.mark.gym]

GYM = "0.7.0"
ASKED_PYTHON = "3.13.14"
"""What its wheel asks for; it runs on 3.13.0 as well, which is the newest on some machines."""
BOTH = {"resources_servers": ("keypad", "stockroom")}
SERVERS = {**BOTH, "responses_api_agents": ("secretive",)}


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        python = find_interpreter("3.13", "0.4.0").path  # as for a Gym that asks for no patch release
    except ConfigError as none:
        pytest.skip(f"NeMo Gym {GYM} needs Python 3.13. {none}")
    prefix = tmp_path_factory.mktemp("gym") / "venv"
    uv, own = find_uv_bin(), str(prefix / "bin" / "python")
    for command in (
        [uv, "venv", "--python", str(python), str(prefix)],
        [uv, "pip", "install", "--python", own, "--python-version", ASKED_PYTHON, f"nemo-gym=={GYM}"],
        [own, "-c", "import nemo_gym.cli.env, nemo_gym.base_resources_server"],  # compiled once, not by each server
    ):
        subprocess.run(command, check=True, env=clean_environment())
    return prefix


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_servers(tmp_path_factory.mktemp("environments"), SERVERS)


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("captures")


@pytest.fixture(scope="module")
def plain(venv: Path, root: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """As gymlink runs every Gym: no ids travel."""
    with session_over(
        root,
        BOTH,
        tokenizer=tokenizer,
        engine=ScriptedPolicy(tokenizer).engine,
        run_dir=tmp_path_factory.mktemp("plain"),
        gym={"venv": str(venv)},
        rollout={"deadline_s": 60},
    ) as session:
        yield session


@pytest.fixture(scope="module")
def strict(
    venv: Path, root: Path, captures: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
    """With all that Gym 0.7 can ask of an endpoint."""
    model_server = {"supply_prefix_token_ids": True, "request_prompt_and_generation_token_ids": True}
    overrides = {
        "policy_model": {"responses_api_models": {"vllm_model": model_server}},
        "token_id_capture": {"enabled": True, "all_agents": True, "dir": str(captures)},
    }
    with session_over(
        root,
        SERVERS,
        tokenizer=tokenizer,
        engine=ScriptedPolicy(tokenizer).engine,
        run_dir=tmp_path_factory.mktemp("strict"),
        gym={"venv": str(venv), "overrides": overrides},
        rollout={"deadline_s": 60},
        gateway={"token_ids": "messages"},
    ) as session:
        yield session


def captured(captures: Path, rollout_id: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (captures / f"{rollout_id}.tokens.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["keypad", "stockroom"])
def test_gym_accepts_every_turn_and_the_batches_are_those_without(
    plain: Session, strict: Session, captures: Path, name: str
) -> None:
    assert plain.gym_version == strict.gym_version == GYM
    rows = rows_of(name, 4)
    proven = collect(strict, rows)
    assert {rollout.status for rollout in proven} == {RolloutStatus.COMPLETED}, [one.detail for one in proven]
    assert [told(rollout) for rollout in proven] == [told(rollout) for rollout in collect(plain, rows)]
    for rollout in proven:
        entries = captured(captures, rollout.rollout_id)
        assert [tuple(entry["generation_token_ids"]) for entry in entries] == [
            turn.completion_ids for turn in rollout.turns
        ]
        assert [entry["prefix_requested"] for entry in entries] == [False] + [True] * (len(entries) - 1)
        assert [entry["prefix_supplied"] for entry in entries] == [entry["prefix_requested"] for entry in entries]
        assert len(entries) > 1


def test_an_agent_that_drives_its_own_calls_is_known_by_gyms_capture(strict: Session) -> None:
    rows = [row("secretive", f"write {n}") for n in range(3)]
    for rollout in collect(strict, rows):
        assert rollout.status is RolloutStatus.COMPLETED, rollout.detail
        assert [turn.parent for turn in rollout.turns] == [None, 0, None]
        assert [len(segment.turns) for segment in rollout.segments] == [2, 1]
        assert rollout.trained_tokens == rollout.sampled_tokens > 0
    assert strict.service.totals.unattributed_tokens == 0
