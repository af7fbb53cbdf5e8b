"""For the tests of engines and plugins, ours and other people's: the contract that every engine keeps.

Inherit `EngineContract` in a test class, give it an `engine` fixture, and pytest (with pytest-asyncio in auto mode)
runs the checks. `gymlink.engines.ScriptedEngine` is the test double for everything above the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Sequence

from gymlink.engines import Engine
from gymlink.errors import ContextOverflowError, EngineError
from gymlink.types import Generation, Sampling


class EngineContract:
    """What the gateway relies on. Override `prompt` and `stop_token_ids` to fit the engine's vocabulary.

    With no stop token given, the engine under test must be able to sample `long` tokens.
    """

    prompt: Sequence[int] = (1, 2, 3)
    stop_token_ids: Sequence[int] = (0,)
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
        return await engine.generate(prompt or self.prompt, sampling, stop_token_ids=stop, rollout_id=name)

    async def test_it_is_an_engine(self, engine: Engine) -> None:
        assert isinstance(engine, Engine)

    async def test_every_id_has_a_logprob_and_the_limit_cuts(self, engine: Engine) -> None:
        sampled = await self._generate(engine, self.long)
        assert len(sampled.token_ids) == len(sampled.logprobs) == self.long
        assert all(isinstance(token, int) for token in sampled.token_ids)
        assert all(logprob <= 0 for logprob in sampled.logprobs)
        assert sampled.finish_reason == "length"

    async def test_a_sampled_stop_token_is_the_last_id(self, engine: Engine) -> None:
        seen = await self._generate(engine, self.long)
        everything = tuple(range(max(seen.token_ids) + 1000))
        stopped = await self._generate(engine, self.long, stop=everything)
        assert len(stopped.token_ids) == 1
        assert stopped.finish_reason == "stop"

    async def test_the_weight_version_is_the_engines(self, engine: Engine) -> None:
        assert (await self._generate(engine, 1)).weight_version == engine.weight_version

    async def test_a_prompt_without_room_is_an_overflow(self, engine: Engine) -> None:
        if engine.max_context is None:
            return
        prompt = [self.prompt[0]] * engine.max_context
        refusal = await _refusal(self._generate(engine, 1, prompt=prompt))
        assert isinstance(refusal, ContextOverflowError)
        assert "context length" in str(refusal)

    async def test_a_prompt_that_nearly_fills_the_context_gets_what_is_left(self, engine: Engine) -> None:
        if engine.max_context is None:
            return
        prompt = [self.prompt[0]] * (engine.max_context - 2)
        sampled = await self._generate(engine, None, prompt=prompt)
        assert len(sampled.token_ids) == 2
        assert sampled.finish_reason == "length"

    async def test_calls_run_side_by_side(self, engine: Engine) -> None:
        calls = [self._generate(engine, 1 + index % self.long, name=str(index)) for index in range(24)]
        sampled = await asyncio.wait_for(asyncio.gather(*calls), 60)
        assert [len(one.token_ids) for one in sampled] == [1 + index % self.long for index in range(24)]

    async def test_a_cancelled_call_leaves_the_engine_working(self, engine: Engine) -> None:
        call = asyncio.create_task(self._generate(engine, self.long, name="cancelled"))
        await asyncio.sleep(0)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        assert len((await asyncio.wait_for(self._generate(engine, 2), 60)).token_ids) == 2

    async def test_a_closed_engine_refuses_and_closing_twice_is_fine(self, engine: Engine) -> None:
        await engine.aclose()
        await engine.aclose()
        assert await _refusal(self._generate(engine, 1)) is not None


async def _refusal(call: Awaitable[Generation]) -> EngineError | None:
    try:
        await call
    except EngineError as error:
        return error
    return None
