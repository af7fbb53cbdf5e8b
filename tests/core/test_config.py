from pathlib import Path

import pytest

from gymlink.config import load_settings, parse_settings
from gymlink.errors import ConfigError

MINIMAL = {"gym": {"config_paths": ["a.yaml"]}}


def test_defaults_need_only_the_environments() -> None:
    settings = parse_settings(MINIMAL)
    assert settings.rollout.attempts == 1
    assert settings.alignment.reasoning == "keep"
    assert settings.gateway.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"gym": {"config_path": ["a"], "config_paths": ["b"]}}, "'gym.config_path' (did you mean 'config_paths'?)"),
        ({**MINIMAL, "rolout": {}}, "unknown key 'rolout' (did you mean 'rollout'?)"),
        ({**MINIMAL, "rollout": {"zzz": 1}}, "unknown key 'rollout.zzz' (known keys: concurrency, deadline_s"),
        ({}, "the key 'gym' is missing"),
        ({"gym": {}}, "give config_paths to start Gym, or head_server"),
        ({"gym": {"config_paths": ["a"], "head_server": "http://h:1"}}, "not both"),
        ({"gym": {"head_server": "h:1"}}, "write the whole address"),
        (
            {**MINIMAL, "rollout": {"attempts": 0}},
            "rollout.attempts: Input should be greater than or equal to 1 (got",
        ),
        ({**MINIMAL, "alignment": {"reasoning": "maybe"}}, "alignment.reasoning: Input should be 'keep' or 'drop'"),
        ({"gym": {"config_paths": "a.yaml"}}, "gym.config_paths: a list is needed (got 'a.yaml')"),
        ({"gym": None}, "gym: a mapping is needed (got None)"),
        ([], "expected a mapping"),
    ],
)
def test_what_cannot_work_is_named(data: object, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_settings(data)
    assert said in str(raised.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"gym.bad.*rollout.worse"):
        parse_settings({"gym": {"config_paths": ["a"], "bad": 1}, "rollout": {"worse": 2}})


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("{}")
    path = tmp_path / "gym.yaml"
    path.write_text("gym: {config_paths: [mine.yaml, resources_servers/x/configs/x.yaml], venv: env}")
    settings = load_settings(path)
    assert settings.gym.config_paths == (str(tmp_path / "mine.yaml"), "resources_servers/x/configs/x.yaml")
    assert settings.gym.venv == tmp_path / "env"
    assert settings.gym.root == tmp_path


def test_a_missing_file_and_bad_yaml_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read the settings file '.*nothing.yaml': No such file"):
        load_settings(tmp_path / "nothing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"gym: \xe9")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_settings(tmp_path / "latin.yaml")
    (tmp_path / "bad.yaml").write_text("gym: [")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_settings(tmp_path / "bad.yaml")


def test_token_ids_stay_at_the_gateway_unless_they_are_asked_to_travel() -> None:
    gym = {"gym": {"config_paths": ["a.yaml"]}}
    assert not parse_settings(gym).gateway.ids_travel
    assert parse_settings({**gym, "gateway": {"token_ids": "messages"}}).gateway.ids_travel
    with pytest.raises(ConfigError, match=r"gateway\.token_ids: .* 'gateway' or 'messages' \(got 'both'\)"):
        parse_settings({**gym, "gateway": {"token_ids": "both"}})
