"""A real Gym with our two environments, and a policy for it that answers by rule."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gymlink.config import GymSettings
from gymlink.gym import GymServers, start_gym

ENVIRONMENTS = Path(__file__).parents[3] / "examples" / "environments"
CONFIGS = tuple(f"resources_servers/{name}/configs/{name}.yaml" for name in ("keypad", "stockroom"))


class StubPolicy:
    """An OpenAI-shaped endpoint: types 1234, or takes two nuts and says done when there are tools."""

    key = "the run's secret"

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner, self.url = self._wait(self._start())

    def close(self) -> None:
        self._wait(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, job: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(job, self._loop).result(10)

    async def _start(self) -> tuple[web.AppRunner, str]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, f"http://127.0.0.1:{runner.addresses[0][1]}/v1"

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        self.keys.add(request.headers.get("Authorization"))
        message: dict[str, Any] = {"role": "assistant", "content": "1234"}
        if body.get("tools"):
            asked = any(message["role"] == "tool" for message in body["messages"])
            call = {"name": "take", "arguments": json.dumps({"item": "nut", "quantity": 2})}
            message = {"role": "assistant", "content": "done" if asked else ""}
            if not asked:
                message["tool_calls"] = [{"id": "call_1", "type": "function", "function": call}]
        message |= {
            "prompt_token_ids": [1, 2, len(body["messages"])],
            "generation_token_ids": [7, 8],
            "generation_log_probs": [-0.5, -0.25],
        }
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if "tool_calls" in message else "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        return web.json_response(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "policy",
                "choices": [choice],
                "usage": usage,
            }
        )


@pytest.fixture(scope="session")
def policy() -> Iterator[StubPolicy]:
    stub = StubPolicy()
    yield stub
    stub.close()


@pytest.fixture(scope="session")
def running_gym(policy: StubPolicy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GymServers]:
    settings = GymSettings(config_paths=CONFIGS, root=ENVIRONMENTS)
    run_dir = tmp_path_factory.mktemp("run with a space")
    with start_gym(
        settings,
        policy_base_url=policy.url,
        policy_api_key=policy.key,
        token_ids="messages",
        run_dir=run_dir,
        report=print,
    ) as gym:
        yield gym
