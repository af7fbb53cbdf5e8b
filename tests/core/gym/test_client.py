"""The client against a real server that behaves badly."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from gymlink.errors import GymRequestError
from gymlink.gym import GymClient

NESTED = b'"Hit an exception in Agent calling an inner server: b\'\\"boom\\"\'"'


class Gym:
    def __init__(self) -> None:
        self.url = ""
        self.cookies: list[str | None] = []
        self.ports: set[Any] = set()
        self.at_once = self.most_at_once = 0

    @property
    def agents(self) -> dict[str, str]:
        names = ("good", "slow", "broken", "garbage", "no_reward", "hangs_up", "counting")
        return {name: f"{self.url}/{name}" for name in names} | {"absent": "http://127.0.0.1:9"}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.cookies.append(request.headers.get("Cookie"))
        assert request.transport is not None
        self.ports.add(request.transport.get_extra_info("peername")[1])
        match request.match_info.get("agent"):
            case "slow":
                await asyncio.sleep(30)
            case "broken":
                return web.Response(status=500, body=NESTED)
            case "garbage":
                return web.Response(text="<html>" + "x" * 2000 + "</html>")
            case "no_reward":
                return web.json_response({"response": {}})
            case "hangs_up":
                request.transport.close()
            case "counting":
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                await asyncio.sleep(1.5)  # all of them have come by then, also on a busy machine
                self.at_once -= 1
        response = web.json_response({"reward": 1.0, "row": await request.json()})
        response.set_cookie("session", "mine")
        return response


@pytest.fixture
async def gym() -> AsyncIterator[Gym]:
    gym = Gym()
    app = web.Application()
    app.router.add_post("/{agent}/run", gym.answer)
    app.router.add_post("/run", gym.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    gym.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield gym
    await runner.cleanup()


async def test_a_row_goes_out_and_its_answer_comes_back(gym: Gym) -> None:
    async with GymClient(gym) as client:
        assert await client.run("good", {"a": [1]}, timeout_s=5) == {"reward": 1.0, "row": {"a": [1]}}


async def test_connections_are_used_again_and_cookies_are_not(gym: Gym) -> None:
    async with GymClient(gym) as client:
        for _ in range(5):
            await client.run("good", {}, timeout_s=5)
    assert len(gym.ports) == 1
    assert gym.cookies == [None] * 5


@pytest.mark.parametrize(
    ("agent", "kind", "status", "message"),
    [
        ("slow", "timeout", None, "did not answer within"),
        ("broken", "http", 500, "answered 500: Hit an exception in Agent .*boom"),
        ("garbage", "answer", 200, "not JSON: <html>"),
        ("no_reward", "answer", 200, "without a reward"),
        ("hangs_up", "connection", None, "cannot be reached"),
        ("absent", "connection", None, "cannot be reached at http://127.0.0.1:9/run"),
        ("unknown", "connection", None, "No agent 'unknown' runs; running: absent, broken"),
    ],
)
async def test_each_failure_has_its_kind(gym: Gym, agent: str, kind: str, status: int | None, message: str) -> None:
    async with GymClient(gym) as client:
        with pytest.raises(GymRequestError, match=message) as raised:
            await client.run(agent, {}, timeout_s=0.5 if agent == "slow" else 10)
    assert (raised.value.kind, raised.value.status) == (kind, status)


async def test_hundreds_at_once(gym: Gym) -> None:
    async with GymClient(gym) as client:
        answers = await asyncio.gather(*(client.run("counting", {"n": n}, timeout_s=20) for n in range(400)))
    assert [answer["row"]["n"] for answer in answers] == list(range(400))
    assert gym.most_at_once > 200


async def test_waiting_for_a_connection_counts_against_the_deadline(gym: Gym) -> None:
    async with GymClient(gym, connections=1) as client:
        slow = asyncio.create_task(client.run("slow", {}, timeout_s=10))
        await asyncio.sleep(0.1)
        with pytest.raises(GymRequestError, match="did not answer within"):
            await client.run("good", {}, timeout_s=0.3)
        slow.cancel()


async def test_a_long_error_keeps_both_ends(gym: Gym) -> None:
    async with GymClient(gym) as client:
        with pytest.raises(GymRequestError) as raised:
            await client.run("garbage", {}, timeout_s=5)
    assert len(str(raised.value)) < 700
    assert str(raised.value).endswith("</html>")


async def test_it_works_on_a_loop_in_another_thread(gym: Gym) -> None:
    client = GymClient(gym)  # made here, used there
    answers: list[Any] = []

    async def there() -> None:
        async with client:
            answers.append(await client.run("good", {}, timeout_s=5))

    thread = threading.Thread(target=asyncio.run, args=(there(),))
    thread.start()
    await asyncio.to_thread(thread.join)
    assert answers[0]["reward"] == 1.0
