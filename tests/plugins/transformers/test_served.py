"""A model that is served: it keeps every engine's contract, and samples from the weights that it was given last."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from gymlink.engines import UpdatesWeights
from gymlink.errors import ConfigError, EngineError
from gymlink.hookspecs import EngineRequest
from gymlink.plugins import find_engine, resolve
from gymlink.testing import EngineContract
from gymlink.types import Generation, Sampling
from gymlink_tiny import make_model, make_tokenizer, save_tiny
from gymlink_transformers.logprobs import SampledRow, max_logprob_error
from gymlink_transformers.served import ServedModelEngine

SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_tokens=6)
PROMPT = (5, 6, 7)
LARGEST_ERROR = 1e-5


@pytest.fixture
async def engine(model: Qwen2ForCausalLM) -> AsyncIterator[ServedModelEngine]:
    served = ServedModelEngine(model, SAMPLING)
    try:
        yield served
    finally:
        await served.aclose()


class TestContract(EngineContract):
    prompt = PROMPT

    @pytest.fixture
    async def engine(self) -> AsyncIterator[ServedModelEngine]:
        served = ServedModelEngine(make_model(make_tokenizer(), max_context=128), Sampling())
        try:
            yield served
        finally:
            await served.aclose()


async def sample(engine: ServedModelEngine) -> Generation:
    return await engine.generate(PROMPT, SAMPLING, stop_token_ids=(), rollout_id="r")


def error_under(model: Qwen2ForCausalLM, said: Generation) -> float:
    row = SampledRow(PROMPT, said.token_ids, said.logprobs, [1] * len(said.token_ids))
    return max_logprob_error(model, [row], SAMPLING)


async def test_it_samples_from_the_weights_that_it_loaded_last(engine: ServedModelEngine, tmp_path: Path) -> None:
    first = await sample(engine)
    other = make_model(make_tokenizer(), seed=7)
    other.save_pretrained(tmp_path)
    await engine.load_weights(str(tmp_path), 5)
    second = await sample(engine)
    assert (first.weight_version, second.weight_version) == (0, 5)
    assert error_under(other, second) <= LARGEST_ERROR
    assert error_under(other, first) > 100 * LARGEST_ERROR
    assert isinstance(engine, UpdatesWeights)


async def test_weights_that_do_not_fit_change_nothing(
    engine: ServedModelEngine, model: Qwen2ForCausalLM, tmp_path: Path
) -> None:
    make_model(make_tokenizer(vocab_size=300)).save_pretrained(tmp_path / "smaller")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EngineError, match="another model's"):
        await engine.load_weights(str(tmp_path / "smaller"), 1)
    with pytest.raises(EngineError, match="cannot be loaded"):
        await engine.load_weights(str(tmp_path / "empty"), 1)
    with pytest.raises(EngineError, match="no folder"):
        await engine.load_weights(str(tmp_path / "none"), 1)
    said = await sample(engine)
    assert said.weight_version == 0
    assert error_under(model, said) <= LARGEST_ERROR


async def test_closing_leaves_no_thread(model: Qwen2ForCausalLM) -> None:
    before = set(threading.enumerate())
    served = ServedModelEngine(model, SAMPLING)
    await sample(served)
    await served.aclose()
    left = [one for one in threading.enumerate() if one not in before and "asyncio" not in one.name]
    assert not left


async def test_it_is_made_from_a_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    make = resolve(find_engine("transformers").make)
    folder = save_tiny(tmp_path)
    engine = make(EngineRequest(str(folder), tokenizer, SAMPLING, max_context=64))
    try:
        assert engine.max_context == 64
        assert len((await sample(engine)).token_ids) == SAMPLING.max_tokens
    finally:
        await engine.aclose()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        make(EngineRequest(str(tmp_path / "none"), tokenizer, SAMPLING))
    assert torch.is_grad_enabled()
