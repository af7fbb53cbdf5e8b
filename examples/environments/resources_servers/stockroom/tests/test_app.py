"""Run in the server's folder, where nemo-gym and pytest are installed: `PYTHONPATH=. python -m pytest tests`."""

from unittest.mock import MagicMock

import pytest
from app import StockroomServer, agreement
from fastapi.testclient import TestClient
from nemo_gym.base_resources_server import BaseResourcesServerConfig
from nemo_gym.server_utils import ServerClient


@pytest.fixture
def client() -> TestClient:
    config = BaseResourcesServerConfig(host="", port=0, entrypoint="", name="stockroom")
    server = StockroomServer(config=config, server_client=MagicMock(spec=ServerClient))
    return TestClient(server.setup_webserver())


@pytest.mark.parametrize(
    ("basket", "wanted", "expected"),
    [
        ({"nut": 2}, {"nut": 2}, 1.0),
        ({"nut": 1}, {"nut": 2}, 0.5),
        ({"nut": 2, "bolt": 2}, {"nut": 2}, 0.5),
        ({}, {"nut": 2}, 0.0),
    ],
)
def test_reward_is_the_part_that_agrees(basket: dict, wanted: dict, expected: float) -> None:
    assert agreement(basket, wanted) == expected


def test_tools_change_the_session(client: TestClient) -> None:
    client.post("/seed_session", json={"stock": {"nut": 3}})
    assert client.post("/look_up", json={"item": "nut"}).json() == {"stock": 3}
    assert client.post("/take", json={"item": "nut", "quantity": 2}).json() == {"basket": {"nut": 2}}
    assert client.post("/take", json={"item": "nut", "quantity": 2}).json() == {"error": "only 1 left"}
    assert client.post("/look_up", json={"item": "nut"}).json() == {"stock": 1}
