"""One real Gym with all the environments of these tests, and a policy that follows a script."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from gymlink.config import parse_settings
from gymlink.demo import environments_root
from gymlink.engines import ScriptedEngine
from gymlink.session import Session
from gymlink.types import Sampling


class ScriptedPolicy:
    """Says what `reply` makes of the text of each prompt; a test sets `reply`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.reply = lambda prompt: "nothing"
        self.engine = ScriptedEngine(self._script)

    def _script(self, prompt_ids: tuple[int, ...]) -> list[int]:
        reply = self.reply(self._tokenizer.decode(prompt_ids))
        return self._tokenizer.encode(reply + "<|im_end|>", add_special_tokens=False)


@pytest.fixture(scope="session")
def policy(tokenizer: PreTrainedTokenizerFast) -> ScriptedPolicy:
    return ScriptedPolicy(tokenizer)


@pytest.fixture(scope="session")
def make_policy(tokenizer: PreTrainedTokenizerFast) -> Callable[[], ScriptedPolicy]:
    return lambda: ScriptedPolicy(tokenizer)


@pytest.fixture
def own_policy(tokenizer: PreTrainedTokenizerFast) -> ScriptedPolicy:
    """For a test with a session of its own, which closes the engine."""
    return ScriptedPolicy(tokenizer)


@pytest.fixture(scope="session")
def session(
    tokenizer: PreTrainedTokenizerFast, policy: ScriptedPolicy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Session]:
    servers = ("keypad/configs/keypad", "stockroom/configs/stockroom", "reasoning_gym/configs/reasoning_gym")
    settings = parse_settings(
        {
            "gym": {
                "config_paths": [f"resources_servers/{server}.yaml" for server in servers],
                "root": str(environments_root()),
            },
            "rollout": {"deadline_s": 120, "concurrency": 16},
        },
        folder=environments_root(),
    )
    with Session(
        settings,
        tokenizer=tokenizer,
        engine=policy.engine,
        sampling=Sampling(max_tokens=256),
        run_dir=tmp_path_factory.mktemp("session"),
    ) as running:
        yield running


@pytest.fixture
def environments() -> Path:
    return environments_root()
