"""One real Gym with all the environments of these tests, and a policy that follows a script."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from gym_batches import ScriptedPolicy, link_servers, session_over
from gymlink.demo import environments_root
from gymlink.session import Session

OURS = {
    "resources_servers": ("keypad", "stockroom", "flaky"),
    "responses_api_agents": ("forgetful", "nameless"),
}
SETTINGS = {
    "rollout": {"deadline_s": 120, "concurrency": 16, "max_failed_fraction": 1},
    "gateway": {"pause_hold_s": 0.2},
}


@pytest.fixture(scope="session")
def policy(tokenizer: PreTrainedTokenizerFast) -> ScriptedPolicy:
    return ScriptedPolicy(tokenizer)


@pytest.fixture
def own_policy(tokenizer: PreTrainedTokenizerFast) -> ScriptedPolicy:
    """For a test with a session of its own, which closes the engine."""
    return ScriptedPolicy(tokenizer)


@pytest.fixture(scope="session")
def session(
    tokenizer: PreTrainedTokenizerFast, policy: ScriptedPolicy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
    root = link_servers(tmp_path_factory.mktemp("environments"), OURS)
    servers = {**OURS, "resources_servers": (*OURS["resources_servers"], "reasoning_gym")}
    run_dir = tmp_path_factory.mktemp("session")
    with session_over(root, servers, tokenizer=tokenizer, engine=policy.engine, run_dir=run_dir, **SETTINGS) as running:
        yield running


@pytest.fixture(scope="module")
def session_with_ids(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """As `session`, but token ids travel through Gym."""
    settings = {**SETTINGS, "gateway": {**SETTINGS["gateway"], "token_ids": "messages"}}
    root = link_servers(tmp_path_factory.mktemp("environments"), OURS)
    engine, run_dir = ScriptedPolicy(tokenizer).engine, tmp_path_factory.mktemp("session")
    with session_over(root, OURS, tokenizer=tokenizer, engine=engine, run_dir=run_dir, **settings) as running:
        yield running


@pytest.fixture
def environments() -> Path:
    return environments_root()
