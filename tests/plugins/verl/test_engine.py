"""verl's servers as an engine: the contract of every engine, and what only these servers say."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from transformers import Qwen2ForCausalLM
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from gymlink.engines import Engine
from gymlink.errors import EngineError
from gymlink.testing import EngineContract
from gymlink.types import Generation, Sampling
from gymlink_verl.engine import ServerEngine
from verl_on_cpu.server import Limits, TokenServer

CONTEXT = 64
STOP = 9


class Client(LLMServerClient):
    """verl's own client with one server, which is called here and not through Ray."""

    def __init__(self, server: TokenServer) -> None:
        super().__init__(
            OmegaConf.create({"actor_rollout_ref": {"rollout": {"name": "cpu", "full_determinism": False}}})
        )
        self._server = SimpleNamespace(generate=SimpleNamespace(remote=server.generate))

    async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        return "0", self._server

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        pass


@pytest.fixture
def server(model: Qwen2ForCausalLM) -> TokenServer:
    return TokenServer(model, eos=(), limits=Limits(prompt=CONTEXT, response=CONTEXT, context=CONTEXT))


@pytest.fixture
def engine(server: TokenServer) -> Engine:
    return ServerEngine(Client(server), CONTEXT)


class TestServerEngine(EngineContract):
    pass


async def test_versions_and_routed_experts_come_through_untouched(
    server: TokenServer, engine: Engine, model: Qwen2ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VERL_ON_CPU_ROUTED_EXPERTS", "1")
    await server.load_weights(model.state_dict(), 7)
    said = await ask(engine, [1, 2], max_tokens=3)
    assert (said.weight_version, said.oldest_weight_version, engine.weight_version) == (7, 7, 7)
    assert said.routed_experts.shape == (2 + 3 - 1, 2, 2)


async def ask(engine: Engine, prompt: Sequence[int] = (1, 2), **sampling: Any) -> Generation:
    return await engine.generate(prompt, Sampling(**sampling), stop_token_ids=[STOP], rollout_id="r")


class Told:
    """A client that answers as it was told, and keeps what it was asked."""

    def __init__(self, answer: TokenOutput | Exception) -> None:
        self.answer = answer
        self.asked: dict[str, Any] = {}

    async def generate(self, request_id: str, **asked: Any) -> Any:
        self.asked = {"request_id": request_id, **asked}
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def output(ids: Sequence[int], reason: str | None = "completed", **more: Any) -> TokenOutput:
    return TokenOutput(token_ids=list(ids), log_probs=[-0.5] * len(ids), stop_reason=reason, **more)


@pytest.mark.parametrize(
    ("ids", "told", "expected"),
    [
        ([4, STOP], "completed", "stop"),
        ([4, 5, STOP], "completed", "stop"),
        ([4, 5, 6], "completed", "length"),
        ([4, 5, 6], None, "length"),
        ([4, 5], "length", "length"),
        ([4, STOP], "length", "stop"),
        # A stop string, or a stop token of the server's own.
        ([4, 5], "completed", "stop"),
        ([4], "aborted", "abort"),
        ([4], "abort", "abort"),
        ([], "aborted", "abort"),
    ],
)
async def test_why_a_turn_ended(ids: list[int], told: str | None, expected: str) -> None:
    """verl's vLLM server says "completed" also where `max_tokens` cut."""
    said = await ask(ServerEngine(Told(output(ids, told)), CONTEXT), max_tokens=3)
    assert (said.token_ids, said.finish_reason) == (tuple(ids), expected)


async def test_the_context_is_a_limit_too() -> None:
    client = Told(output([4, 5]))
    said = await ask(ServerEngine(client, 4), [1, 2], max_tokens=100)
    assert client.asked["sampling_params"]["max_tokens"] == 2
    assert said.finish_reason == "length"


async def test_how_verl_is_asked() -> None:
    client = Told(output([STOP]))
    engine = ServerEngine(client, CONTEXT)
    await ask(engine, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, max_tokens=8)
    assert client.asked == {
        "request_id": "r",
        "prompt_ids": [1, 2],
        "sampling_params": {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.0,
            "logprobs": True,
            "max_tokens": 8,
            "stop_token_ids": [STOP],
        },
    }
    await ask(engine)
    assert client.asked["sampling_params"]["top_k"] == -1, "verl's way to keep every token"
    assert "min_p" not in client.asked["sampling_params"], "SGLang knows none in some versions"
    assert client.asked["sampling_params"]["max_tokens"] == CONTEXT - 2


@pytest.mark.parametrize("logprobs", [None, [], [-0.5]])
async def test_missing_logprobs_name_the_setting(logprobs: list[float] | None) -> None:
    engine = ServerEngine(Told(TokenOutput(token_ids=[4, STOP], log_probs=logprobs)), CONTEXT)
    with pytest.raises(EngineError, match=r"2 token ids with \d logprobs.*calculate_log_probs=True"):
        await ask(engine)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ConnectionError("gone"), TimeoutError("late")])
async def test_whatever_verl_raises_is_the_engines(error: Exception) -> None:
    with pytest.raises(EngineError, match=f"{type(error).__name__}: {error}") as caught:
        await ask(ServerEngine(Told(error), CONTEXT))
    assert caught.value.__cause__ is error


async def test_a_cancelled_call_is_cancelled() -> None:
    class Never:
        async def generate(self, request_id: str, **_: Any) -> Any:
            await asyncio.Event().wait()

    call = asyncio.create_task(ask(ServerEngine(Never(), CONTEXT)))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_the_oldest_and_the_newest_weights_of_a_turn() -> None:
    """verl's asynchronous client goes on after an update: one turn, sampled with two versions."""
    experts = np.zeros((3, 1, 1))
    client = Told(
        output([4, STOP], routed_experts=experts, extra_fields={"min_global_steps": 3, "max_global_steps": 5})
    )
    engine = ServerEngine(client, CONTEXT)
    said = await ask(engine)
    assert (said.oldest_weight_version, said.weight_version, engine.weight_version) == (3, 5, 5)
    assert said.routed_experts is experts

    client.answer = output([STOP], extra_fields={"min_global_steps": None, "max_global_steps": None})
    said = await ask(engine)
    assert (said.oldest_weight_version, said.weight_version) == (None, 5), "a server that tells none changes none"
