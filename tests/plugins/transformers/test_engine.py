"""The engine on a live model: exact logprobs across updates, nothing left behind, never a hang."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import pytest
import torch
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from gymlink.engines.base import Engine
from gymlink.errors import ContextOverflowError, EngineError, PluginError
from gymlink.types import Generation, Sampling
from gymlink_tiny import make_model
from gymlink_transformers.engine import LiveModelEngine
from gymlink_transformers.logprobs import SampledRow, max_logprob_error

EIGHT = Sampling(max_tokens=8)


def prompt(tokenizer: PreTrainedTokenizerBase, text: str = "press four digits") -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    return ids


def generate(
    engine: LiveModelEngine, prompts: Sequence[Sequence[int]], sampling: Sampling = EIGHT, stops: Sequence[int] = ()
) -> list[Generation]:
    """Many calls at a time, from an event loop on another thread, as the gateway makes them."""

    async def all_of_them() -> list[Generation]:
        calls = [
            engine.generate(ids, sampling, stop_token_ids=stops, rollout_id=str(index))
            for index, ids in enumerate(prompts)
        ]
        return await asyncio.gather(*calls)

    outcome: list[list[Generation] | BaseException] = []

    def work() -> None:
        try:
            outcome.append(asyncio.run(all_of_them()))
        except BaseException as error:  # noqa: BLE001 - carried to the test's own thread
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (result,) = outcome
    if isinstance(result, BaseException):
        raise result
    return result


def rows(prompts: Sequence[Sequence[int]], generations: Sequence[Generation]) -> list[SampledRow]:
    return [
        SampledRow(ids, one.token_ids, one.logprobs, [1] * len(one.token_ids))
        for ids, one in zip(prompts, generations, strict=True)
    ]


def second_turns(prompts: Sequence[Sequence[int]], generations: Sequence[Generation]) -> list[list[int]]:
    return [[*ids, *one.token_ids, *ids] for ids, one in zip(prompts, generations, strict=True)]


def update(model: Qwen2ForCausalLM) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def test_is_an_engine(model: Qwen2ForCausalLM) -> None:
    assert isinstance(LiveModelEngine(model), Engine)


def test_logprobs_are_those_of_the_weights_over_many_updates(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = LiveModelEngine(model)
    first = [prompt(tokenizer, "one"), prompt(tokenizer, "another one"), prompt(tokenizer, "one")] * 4
    for _ in range(12):
        with engine.sampling(EIGHT):
            turns = generate(engine, first)
            second = second_turns(first, turns)
            more = generate(engine, second)
        assert max_logprob_error(model, rows(first, turns) + rows(second, more), EIGHT) <= 1e-4
        update(model)


def test_a_stale_cache_would_be_noticed(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """The yardstick itself: weights that change within a period give logprobs that are far off."""
    engine = LiveModelEngine(model)
    long = [prompt(tokenizer, "many words that fill more than one page of the cache " * 3)]
    with engine.sampling(EIGHT):
        generate(engine, long)
        update(model)
        stale = generate(engine, long)
    assert max_logprob_error(model, rows(long, stale), EIGHT) > 1e-2


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, max_tokens=8),
        Sampling(temperature=1.3, top_k=20, max_tokens=8),
        Sampling(top_p=0.8, max_tokens=8),
        Sampling(min_p=0.5, max_tokens=8),
        Sampling(temperature=0.0, max_tokens=8),
    ],
    ids=["temperature", "top_k", "top_p", "min_p", "greedy"],
)
def test_logprobs_are_of_the_distribution_sampled_from(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> None:
    engine = LiveModelEngine(model)
    prompts = [prompt(tokenizer)] * 4
    with engine.sampling(sampling):
        turns = generate(engine, prompts, sampling)
    assert max_logprob_error(model, rows(prompts, turns), sampling) <= 1e-4
    if sampling.temperature == 0.0:
        assert len({one.token_ids for one in turns}) == 1


def test_a_cache_too_small_for_all_gives_the_same_logprobs(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Requests that are evicted and taken up again keep their tokens and logprobs."""
    engine = LiveModelEngine(model, max_context=128, batching={"num_blocks": 8, "page_size": 16})
    prompts = [prompt(tokenizer, f"press {n}") for n in range(12)]
    sampling = Sampling(max_tokens=40)
    with engine.sampling(sampling):
        turns = generate(engine, prompts, sampling)
    assert [len(one.token_ids) for one in turns] == [40] * 12
    assert max_logprob_error(model, rows(prompts, turns), sampling) <= 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was(tokenizer: PreTrainedTokenizerBase, attention: str) -> None:
    model = make_model(tokenizer)
    model.set_attn_implementation(attention)
    model.train()
    model.lm_head.eval()  # a module of its own mode keeps it
    checkpointing = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    checkpointing()
    model.config.use_cache = False
    before = {
        "modes": [module.training for module in model.modules()],
        "forward": model.__dict__.get("forward"),
        "attention": model.config._attn_implementation,
        "use_cache": model.config.use_cache,
        "grads": [parameter.requires_grad for parameter in model.parameters()],
        "random": torch.get_rng_state().tolist(),
    }
    threads = threading.active_count()
    engine = LiveModelEngine(model)
    prompts = [prompt(tokenizer)] * 2
    with engine.sampling(EIGHT):
        turns = generate(engine, prompts)
    assert max_logprob_error(model, rows(prompts, turns), EIGHT) <= 1e-4
    assert threading.active_count() == threads
    assert before == {
        "modes": [module.training for module in model.modules()],
        "forward": model.__dict__.get("forward"),
        "attention": model.config._attn_implementation,
        "use_cache": model.config.use_cache,
        "grads": [parameter.requires_grad for parameter in model.parameters()],
        "random": torch.get_rng_state().tolist(),
    }
    loss = model(input_ids=torch.tensor(prompts), labels=torch.tensor(prompts)).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_model_is_left_as_it_was_when_a_collection_fails(model: Qwen2ForCausalLM) -> None:
    model.train()
    engine = LiveModelEngine(model)
    with pytest.raises(KeyboardInterrupt), engine.sampling(EIGHT):
        raise KeyboardInterrupt
    assert model.training
    with pytest.raises(EngineError, match="not collecting"):
        generate(engine, [[1, 2, 3]])


def test_sampling_differs_from_period_to_period_and_repeats_with_the_seed(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    def sampled(seed: int) -> list[tuple[int, ...]]:
        engine = LiveModelEngine(make_model(tokenizer), seed=seed)
        drawn = []
        for _ in range(2):
            with engine.sampling(EIGHT):
                drawn.append(generate(engine, [prompt(tokenizer)])[0].token_ids)
        return drawn

    one, other = sampled(0), sampled(1)
    assert one == sampled(0)
    assert one[0] != one[1]
    assert one != other


def test_weight_version_is_that_of_the_period(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    steps = iter([3, 7])
    current = 0
    engine = LiveModelEngine(model, version=lambda: current)
    for current in steps:
        with engine.sampling(EIGHT):
            (turn,) = generate(engine, [prompt(tokenizer)])
        assert turn.weight_version == engine.weight_version == current


def test_stops_at_a_stop_token_and_keeps_it(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    everything = range(len(tokenizer))
    engine = LiveModelEngine(model)
    with engine.sampling(EIGHT):
        (stopped,) = generate(engine, [prompt(tokenizer)], stops=list(everything))
        (cut,) = generate(engine, [prompt(tokenizer)], stops=[])
    assert len(stopped.token_ids) == 1
    assert stopped.finish_reason == "stop"
    assert len(cut.token_ids) == 8
    assert cut.finish_reason == "length"


def test_the_context_bounds_prompt_and_completion_together(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = prompt(tokenizer)
    engine = LiveModelEngine(model, max_context=len(ids) + 3)
    with engine.sampling(Sampling()):
        (turn,) = generate(engine, [ids], Sampling())
        with pytest.raises(ContextOverflowError, match="context length"):
            generate(engine, [[*ids, 1, 1, 1]], Sampling())
    assert len(turn.token_ids) == 3
    assert turn.finish_reason == "length"


def test_other_sampling_than_the_collections_is_refused(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = LiveModelEngine(model)
    with engine.sampling(EIGHT), pytest.raises(EngineError, match=r"temperature=0\.5"):
        generate(engine, [prompt(tokenizer)], Sampling(temperature=0.5))


@contextmanager
def forward_that(model: Qwen2ForCausalLM, action: Callable[[], None]):  # type: ignore[no-untyped-def]
    hook = model.register_forward_pre_hook(lambda *_: action())
    try:
        yield
    finally:
        hook.remove()


def test_a_model_that_fails_ends_every_call_with_an_error(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel")

    engine = LiveModelEngine(model)
    with forward_that(model, fail), engine.sampling(EIGHT):
        with pytest.raises(EngineError, match="no such kernel"):
            generate(engine, [prompt(tokenizer)] * 4)
        with pytest.raises(EngineError, match="no such kernel"):
            generate(engine, [prompt(tokenizer)])
    with engine.sampling(EIGHT):
        assert len(generate(engine, [prompt(tokenizer)])[0].token_ids) == 8


def test_a_period_that_ends_ends_the_calls_in_flight(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        go_on.wait(10)

    async def call() -> Generation:
        return await engine.generate(prompt(tokenizer), Sampling(), stop_token_ids=[], rollout_id="late")

    caught: list[BaseException] = []

    def work() -> None:
        try:
            asyncio.run(call())
        except EngineError as error:
            caught.append(error)

    engine = LiveModelEngine(model)
    thread = threading.Thread(target=work)
    with forward_that(model, wait), engine.sampling(Sampling()):
        thread.start()
        assert entered.wait(10)
        go_on.set()
    thread.join(10)
    assert not thread.is_alive()
    assert len(caught) == 1


def test_calls_that_come_as_a_collection_ends_are_refused_without_a_word(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    """An interrupt leaves many rollouts open, and each of them asks once more."""
    entered, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        go_on.wait(10)

    async def ask_until_refused() -> list[BaseException | Generation]:
        asked: list[asyncio.Task[Generation]] = []
        while not (asked and asked[-1].done()):
            call = engine.generate(prompt(tokenizer), EIGHT, stop_token_ids=[], rollout_id="late")
            asked.append(asyncio.create_task(call))
            await asyncio.sleep(0.01)
        go_on.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    ended: list[BaseException | Generation] = []
    engine = LiveModelEngine(model)
    thread = threading.Thread(target=lambda: ended.extend(asyncio.run(ask_until_refused())))
    batching_logger = logging.getLogger("ContinuousBatchingLogger")
    batching_logger.addHandler(caplog.handler)
    try:
        with forward_that(model, wait), engine.sampling(EIGHT):
            thread.start()
            assert entered.wait(10)
        thread.join(10)
    finally:
        batching_logger.removeHandler(caplog.handler)
    assert not thread.is_alive()
    assert isinstance(ended[-1], EngineError)
    assert caplog.messages == []


def test_cancelling_a_call_cancels_the_generation(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    forwards = 0

    def count() -> None:
        nonlocal forwards
        forwards += 1

    async def cancel_and_wait() -> int:
        call = asyncio.create_task(
            engine.generate(prompt(tokenizer), Sampling(), stop_token_ids=[], rollout_id="unwanted")
        )
        while not forwards:  # noqa: ASYNC110 - counted by another thread
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.sleep(0.3)
        before = forwards
        await asyncio.sleep(0.3)
        return forwards - before

    engine = LiveModelEngine(model)
    with forward_that(model, count), engine.sampling(Sampling()):
        assert asyncio.run(cancel_and_wait()) == 0
    assert forwards < 1000


def test_one_collection_at_a_time(model: Qwen2ForCausalLM) -> None:
    engine = LiveModelEngine(model)
    with engine.sampling(EIGHT), pytest.raises(EngineError, match="one collection at a time"), engine.sampling(EIGHT):
        pass


def test_what_cannot_work_is_said_at_once(model: Qwen2ForCausalLM) -> None:
    with pytest.raises(PluginError, match="no continuous batching"):
        LiveModelEngine(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    engine = LiveModelEngine(model, batching={"number_of_blocks": 3})
    with pytest.raises(PluginError, match="number_of_blocks"), engine.sampling(EIGHT):
        pass
    with (
        pytest.raises(EngineError, match="does not fit"),
        LiveModelEngine(model, batching={"num_blocks": 10**9}).sampling(EIGHT),
    ):
        pass
