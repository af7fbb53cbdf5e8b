import pytest

from gymlink.engines import Engine, ScriptedEngine, scripted_logprob
from gymlink.errors import ContextOverflowError, EngineError
from gymlink.types import Sampling

ANY = Sampling()


async def generate(engine: ScriptedEngine, prompt: tuple[int, ...] = (1, 2), sampling: Sampling = ANY, stop: int = 9):
    return await engine.generate(prompt, sampling, stop_token_ids=(stop,), rollout_id="r")


def test_it_is_an_engine() -> None:
    assert isinstance(ScriptedEngine(lambda prompt: prompt), Engine)


async def test_the_stop_token_ends_the_completion_and_is_part_of_it() -> None:
    sampled = await generate(ScriptedEngine(lambda _: (5, 9, 7)))
    assert (sampled.token_ids, sampled.finish_reason) == ((5, 9), "stop")
    assert sampled.logprobs == (scripted_logprob(5), scripted_logprob(9))


async def test_the_smaller_of_limit_and_room_cuts() -> None:
    engine = ScriptedEngine(lambda _: (5, 6, 7, 8), max_context=5)
    assert (await generate(engine)).token_ids == (5, 6, 7)
    cut = await generate(engine, sampling=Sampling(max_tokens=2))
    assert (cut.token_ids, cut.finish_reason) == ((5, 6), "length")


async def test_a_full_context_is_an_overflow() -> None:
    with pytest.raises(ContextOverflowError, match="maximum context length is 2 tokens"):
        await generate(ScriptedEngine(lambda _: (5,), max_context=2))


async def test_calls_and_weight_version_are_kept() -> None:
    engine = ScriptedEngine(lambda _: (9,))
    engine.weight_version = 3
    assert (await generate(engine)).weight_version == 3
    assert engine.calls[0].prompt_ids == (1, 2)


async def test_a_closed_engine_refuses() -> None:
    engine = ScriptedEngine(lambda _: (9,))
    await engine.aclose()
    with pytest.raises(EngineError, match="closed"):
        await generate(engine)
