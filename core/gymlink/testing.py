"""For the tests of engines and plugins, ours and other people's: the contract that every engine keeps.

Inherit `EngineContract` in a test class, give it an `engine` fixture, and pytest (with pytest-asyncio in auto mode)
runs the checks. `gymlink.engines.ScriptedEngine` is the test double for everything above the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Sequence

import pytest

from gymlink.engines import Engine, UpdatesWeights
from gymlink.errors import ContextOverflowError, EngineError
from gymlink.types import Generation, Sampling

PATIENCE_S = 60.0
"""How long an engine under test may take for a few tokens, on a busy machine."""


class EngineContract:
    """What the gateway relies on. Override `prompt` and `vocab_size` to fit the engine's vocabulary.

    With no stop token given, the engine under test must be able to sample `long` tokens. It may sample any id below
    `vocab_size`, and takes each of them as a stop token.
    """

    prompt: Sequence[int] = (1, 2, 3)
    vocab_size = 320
    long = 6

    async def _generate(
        self,
        engine: Engine,
        max_tokens: int | None,
        *,
        prompt: Sequence[int] | None = None,
        stop: Sequence[int] = (),
        name: str = "contract",
    ) -> Generation:
        sampling = Sampling(max_tokens=max_tokens)
        call = engine.generate(prompt or self.prompt, sampling, stop_token_ids=stop, rollout_id=name)
        return await asyncio.wait_for(call, PATIENCE_S)

    async def test_it_is_an_engine(self, engine: Engine) -> None:
        assert isinstance(engine, Engine)

    async def test_every_id_has_a_logprob_and_the_limit_cuts(self, engine: Engine) -> None:
        sampled = await self._generate(engine, self.long)
        assert len(sampled.token_ids) == len(sampled.logprobs) == self.long
        assert all(isinstance(token, int) and 0 <= token < self.vocab_size for token in sampled.token_ids)
        assert all(_is_logprob(logprob) for logprob in sampled.logprobs)
        assert sampled.finish_reason == "length"

    async def test_a_sampled_stop_token_is_the_last_id_and_has_a_logprob(self, engine: Engine) -> None:
        stopped = await self._generate(engine, self.long, stop=range(self.vocab_size))
        assert len(stopped.token_ids) == len(stopped.logprobs) == 1
        assert _is_logprob(stopped.logprobs[0])
        assert stopped.finish_reason == "stop"

    async def test_one_token_is_a_limit_too(self, engine: Engine) -> None:
        assert len((await self._generate(engine, 1)).token_ids) == 1

    async def test_the_weight_version_is_the_engines(self, engine: Engine) -> None:
        assert (await self._generate(engine, 1)).weight_version == engine.weight_version

    async def test_a_generation_names_the_weights_that_it_began_and_ended_with(self, engine: Engine) -> None:
        if not isinstance(engine, UpdatesWeights):
            pytest.skip("the engine is not told the version of its weights")
        old = engine.weight_version
        call = asyncio.create_task(self._generate(engine, self.long))
        await asyncio.sleep(0)
        engine.set_weight_version(old + 1)
        spanning = await call
        oldest = spanning.weight_version if spanning.oldest_weight_version is None else spanning.oldest_weight_version
        assert old <= oldest <= spanning.weight_version <= old + 1
        assert engine.weight_version == old + 1
        after = await self._generate(engine, 1)
        assert (after.weight_version, after.oldest_weight_version) == (old + 1, None)

    async def test_a_prompt_without_room_is_an_overflow(self, engine: Engine) -> None:
        if engine.max_context is None:
            pytest.skip("the engine tells no max_context")
        for size in (engine.max_context, engine.max_context + 1):
            refusal = await _refusal(self._generate(engine, 1, prompt=[self.prompt[0]] * size))
            assert isinstance(refusal, ContextOverflowError)
            assert "context length" in str(refusal)

    async def test_a_prompt_that_nearly_fills_the_context_gets_what_is_left(self, engine: Engine) -> None:
        if engine.max_context is None:
            pytest.skip("the engine tells no max_context")
        prompt = [self.prompt[0]] * (engine.max_context - 2)
        for max_tokens in (None, self.long):
            sampled = await self._generate(engine, max_tokens, prompt=prompt)
            assert len(sampled.token_ids) == 2
            assert sampled.finish_reason == "length"

    async def test_calls_run_side_by_side(self, engine: Engine) -> None:
        calls = [self._generate(engine, 1 + index % self.long, name=str(index)) for index in range(24)]
        sampled = await asyncio.gather(*calls)
        assert [len(one.token_ids) for one in sampled] == [1 + index % self.long for index in range(24)]

    async def test_a_rollout_may_have_several_calls_at_a_time(self, engine: Engine) -> None:
        sampled = await asyncio.gather(*(self._generate(engine, 2, name="one") for _ in range(4)))
        assert all(len(one.token_ids) == 2 for one in sampled)

    async def test_a_call_that_is_refused_disturbs_no_other(self, engine: Engine) -> None:
        if engine.max_context is None:
            pytest.skip("the engine tells no max_context")
        too_long = _refusal(self._generate(engine, 1, prompt=[self.prompt[0]] * engine.max_context))
        one, refusal, two = await asyncio.gather(self._generate(engine, 2), too_long, self._generate(engine, 3))
        assert refusal is not None
        assert [len(one.token_ids), len(two.token_ids)] == [2, 3]

    async def test_cancelled_calls_leave_the_engine_working(self, engine: Engine) -> None:
        calls = [asyncio.create_task(self._generate(engine, self.long, name=str(index))) for index in range(16)]
        await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        for call in calls:
            with contextlib.suppress(asyncio.CancelledError):
                await call
        assert len((await self._generate(engine, 2)).token_ids) == 2

    async def test_a_closed_engine_refuses_and_closing_twice_is_fine(self, engine: Engine) -> None:
        await engine.aclose()
        await engine.aclose()
        assert await _refusal(self._generate(engine, 1)) is not None


def _is_logprob(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value <= 0


async def _refusal(call: Awaitable[Generation]) -> EngineError | None:
    try:
        await call
    except EngineError as error:
        return error
    return None
