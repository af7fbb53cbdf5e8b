"""What is asked of Gym about a configuration: by Gym's own parser, in Gym's own environment."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from gymlink.config import GymSettings, TokenIdsPath
from gymlink.demo import environments_root
from gymlink.gym import prepare_gym
from gymlink.gym.configs import MODEL_CONFIGS, Plan, plan, server_instances
from gymlink.gym.install import clean_environment

KEYPAD = str(environments_root() / "resources_servers/keypad/configs/keypad.yaml")
FIELD = "policy_model.responses_api_models.vllm_model.uses_reasoning_parser"


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


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Plan]:
    gym = prepare_gym(GymSettings(config_paths=(KEYPAD,)), print)

    def planned(*own: dict[str, Any], overrides: Sequence[str] = (), token_ids: TokenIdsPath = "gateway") -> Plan:
        paths = [KEYPAD]
        for number, content in enumerate(own):
            path = tmp_path / f"{number}.yaml"
            path.write_text(yaml.safe_dump(content))
            paths.append(str(path))
        where = {"root": tmp_path, "cwd": tmp_path, "env": clean_environment()}
        return plan(gym, paths, overrides, token_ids=token_ids, report=print, **where)

    return planned


def policy_model(**settings: Any) -> dict[str, Any]:
    return {"policy_model": {"responses_api_models": {"vllm_model": settings}}}


@pytest.mark.gym
@pytest.mark.slow
class TestTheModelServer:
    @pytest.mark.parametrize("token_ids", ["gateway", "messages"])
    def test_is_added_where_there_is_none(self, planned: Callable[..., Plan], token_ids: TokenIdsPath) -> None:
        found = planned(token_ids=token_ids)
        assert found.config_paths[0] == MODEL_CONFIGS[token_ids]
        assert [*found.servers["policy_model"]] == ["responses_api_models", "vllm_model"]

    @pytest.mark.parametrize("by_override", [True, False])
    def test_is_added_below_a_few_fields_of_the_users(self, planned: Callable[..., Plan], by_override: bool) -> None:
        own = [] if by_override else [policy_model(uses_reasoning_parser=False)]
        found = planned(*own, overrides=[f"++{FIELD}=false"] if by_override else [])
        assert found.config_paths[0] == MODEL_CONFIGS["gateway"]
        assert "policy_model" in found.servers

    def test_of_the_user_stays_alone(self, planned: Callable[..., Plan]) -> None:
        own = {
            "entrypoint": "app.py",
            "base_url": "${policy_base_url}",
            "api_key": "${policy_api_key}",
            "model": "${policy_model_name}",
            "return_token_id_information": True,
            "uses_reasoning_parser": True,
        }
        found = planned(policy_model(**own))
        assert not set(found.config_paths) & set(MODEL_CONFIGS.values())
        assert "policy_model" in found.servers
