"""A session that attaches to a Gym which somebody else started."""

import socket
from pathlib import Path

import pytest

from gymlink.config import GymSettings, parse_settings
from gymlink.engines import ScriptedEngine
from gymlink.errors import ConfigError
from gymlink.gym import read_rows, start_gym
from gymlink.session import Session
from gymlink.types import RolloutRequest, Sampling

pytestmark = [pytest.mark.slow, pytest.mark.gym]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_an_attached_gym_is_used_and_never_stopped(tokenizer, own_policy, environments: Path, tmp_path: Path) -> None:
    keypad = environments / "resources_servers/keypad"
    port = free_port()
    theirs = GymSettings(
        config_paths=(str(keypad / "configs/keypad.yaml"),),
        root=environments,
        overrides={"policy_api_key": "a secret of theirs"},
    )
    own_policy.reply = lambda prompt: "1234"

    def session(head_url: str, gateway_port: int, engine: ScriptedEngine) -> Session:
        settings = parse_settings({"gym": {"head_server": head_url}, "gateway": {"port": gateway_port}})
        return Session(
            settings,
            tokenizer=tokenizer,
            engine=engine,
            sampling=Sampling(max_tokens=16),
            run_dir=tmp_path / "run",
        )

    with start_gym(
        theirs,
        policy_base_url=f"http://127.0.0.1:{port}/v1",
        policy_api_key="not this one",
        run_dir=tmp_path / "gym",
        report=print,
    ) as gym:
        with pytest.raises(ConfigError, match=r"calls the policy at .* and this gateway answers at"):
            session(gym.head_url, free_port(), ScriptedEngine(lambda prompt: ())).start()
        with session(gym.head_url, port, own_policy.engine) as attached:
            rows = list(read_rows(keypad / "data/train.jsonl", agents=attached.agents))[:3]
            batch = attached.collect([RolloutRequest(row, index) for index, row in enumerate(rows)])
        assert [rollout.reward for rollout in batch.rollouts] == [1.0] * 3, [r.detail for r in batch.rollouts]
        gym.check()
