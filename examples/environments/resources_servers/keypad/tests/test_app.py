"""Run in the server's folder, where nemo-gym and pytest are installed: `PYTHONPATH=. python -m pytest tests`."""

import asyncio
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from app import KeypadServer, count
from nemo_gym.base_resources_server import BaseResourcesServerConfig
from nemo_gym.server_utils import ServerClient


@pytest.fixture
def server() -> KeypadServer:
    config = BaseResourcesServerConfig(host="", port=0, entrypoint="", name="keypad")
    return KeypadServer(config=config, server_client=MagicMock(spec=ServerClient))


def typed(text: str) -> SimpleNamespace:
    return SimpleNamespace(output=[SimpleNamespace(type="message", content=text)] if text else [])


def play(server: KeypadServer, *texts: str, turns: int = 2) -> list:
    async def episode() -> list:
        await server.reset({"turns": turns}, "a session")
        return [await server.step(typed(text), {"turns": turns}, "a session") for text in texts]

    return asyncio.run(episode())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1234", (4, 4)), ("1 2\n3", (3, 3)), ("ab12", (2, 4)), ("", (0, 0)), ("٣", (0, 1))],
)
def test_only_ascii_digits_count_and_spaces_do_not(text: str, expected: tuple[int, int]) -> None:
    assert count(text) == expected


def test_a_perfect_episode_is_worth_one(server: KeypadServer) -> None:
    steps = play(server, "1234", "567890")
    assert [reward for _, reward, *_ in steps] == [0.5, 0.5]
    assert [done for _, _, done, *_ in steps] == [False, True]


def test_a_short_answer_is_worth_less_than_a_whole_one(server: KeypadServer) -> None:
    assert [reward for _, reward, *_ in play(server, "1", "")] == [0.125, 0.0]


def test_the_observation_tells_what_was_typed_so_far(server: KeypadServer) -> None:
    first, second, last = play(server, "12ab", "3", "4", turns=3)
    assert (first[0], second[0], last[0]) == ("digits: 2. type digits", "digits: 3. type digits", None)


def test_a_new_episode_starts_from_nothing(server: KeypadServer) -> None:
    play(server, "1234")
    assert play(server, "1")[0][4] == {"digits": 1, "turns": 1}
