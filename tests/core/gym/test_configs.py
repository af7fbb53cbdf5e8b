from gymlink.gym.configs import server_instances


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
