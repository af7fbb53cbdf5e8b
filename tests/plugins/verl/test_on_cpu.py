"""The fixture that lets verl train without a GPU: its sampling against a plain forward pass, and its server's manners.

The trainers themselves are run by the tests of the plugin; here there is no Ray.
"""

from __future__ import annotations

import asyncio
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # verl 0.9.1 imports what Ray and others call deprecated
    pytest.importorskip("verl")
    import verl.workers.rollout.replica  # noqa: F401

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "verl_on_cpu"))

from verl_on_cpu.sampling import Row, Sampling, complete, distribution
from verl_on_cpu.server import Limits, TokenServer, routed_experts

VOCABULARY, EOS = 64, 3
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [8, 8]]


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return make_model(seed=0)


def make_model(seed: int) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attn_implementation="eager",
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).eval()


def plain_logprobs(model: Qwen2ForCausalLM, prompt: Sequence[int], ids: Sequence[int], temperature: float) -> Any:
    """Of `ids` after `prompt`: one unpadded pass without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor([ids]).T).squeeze(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_plain_forward_pass(model: Qwen2ForCausalLM, temperature: float) -> None:
    """Rows of unequal length that end at different times: padding, the cache and dropped rows change nothing."""
    rows = [Row(prompt, Sampling(5 + 7 * index, temperature)) for index, prompt in enumerate(PROMPTS)]
    complete(model, rows, generator=torch.Generator().manual_seed(1))
    assert [len(row.ids) for row in rows] == [5, 12, 19, 26]
    for row in rows:
        expected = plain_logprobs(model, row.prompt, row.ids, temperature)
        torch.testing.assert_close(torch.tensor(row.logprobs), expected, atol=1e-5, rtol=0)


def test_tokens_are_drawn_as_the_model_says(model: Qwen2ForCausalLM) -> None:
    rows = [Row([5, 6], Sampling(1)) for _ in range(4000)]
    complete(model, rows, generator=torch.Generator().manual_seed(2))
    seen = torch.bincount(torch.tensor([row.ids[0] for row in rows]), minlength=VOCABULARY) / len(rows)
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    assert (seen - expected).abs().sum() < 0.15, "total variation of 4000 draws from 64 tokens is about 0.1"


def test_temperature_zero_takes_the_likeliest(model: Qwen2ForCausalLM) -> None:
    row = Row(PROMPTS[2], Sampling(6, temperature=0))
    complete(model, [row, Row([5], Sampling(3))])
    for index, token in enumerate(row.ids):
        with torch.no_grad():
            logits = model(torch.tensor([[*row.prompt, *row.ids[:index]]])).logits[0, -1]
        assert token == int(logits.argmax())
        assert row.logprobs[index] == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-5)


def test_top_k_and_top_p_cut_and_renormalise() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert distribution(logits, Sampling(1, top_k=2)).exp().tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert distribution(logits, Sampling(1, top_p=0.7)).exp().tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert distribution(logits, Sampling(1, top_k=3, top_p=0.1)).exp().tolist() == pytest.approx([1, 0, 0, 0])
    assert distribution(logits, Sampling(1, top_k=-1, top_p=1.0)).exp().tolist() == pytest.approx(
        [0.5, 0.3, 0.15, 0.05]
    )


def test_a_stop_token_is_the_last_id(model: Qwen2ForCausalLM) -> None:
    stop = frozenset(range(0, VOCABULARY, 2))
    rows = [Row(prompt, Sampling(50, stop=stop)) for prompt in PROMPTS]
    complete(model, rows, generator=torch.Generator().manual_seed(3))
    for row in rows:
        assert row.ended == "completed"
        assert row.ids[-1] in stop
        assert not stop.intersection(row.ids[:-1])


def test_parameters_are_read_as_vllm_reads_them() -> None:
    def read(**params: Any) -> Sampling:
        return Sampling.read(params, max_tokens=10, limit=20, eos={EOS})

    assert read(logprobs=True, repetition_penalty=1.0, temperature=1.0, top_p=1, top_k=-1) == Sampling(
        10, stop=frozenset({EOS})
    )
    assert read(max_tokens=4, stop_token_ids=[7]).stop == {7, EOS}
    assert read(max_new_tokens=40).max_tokens == 20
    assert read(ignore_eos=True).stop == frozenset()
    with pytest.raises(ValueError, match="repetition_penalty"):
        read(repetition_penalty=1.2)
    with pytest.raises(ValueError, match="stop"):
        read(stop=["\n"])


@pytest.fixture
def server(model: Qwen2ForCausalLM) -> Iterator[TokenServer]:
    return TokenServer(model, eos={EOS}, limits=Limits(prompt=64, response=64, context=128))


async def ask(server: TokenServer, prompt: Sequence[int], **params: Any) -> Any:
    return await server.generate(prompt, {"logprobs": True, **params}, request_id="r")


async def test_requests_that_wait_are_answered_together(server: TokenServer) -> None:
    answers = await asyncio.gather(*(ask(server, prompt, max_tokens=8, ignore_eos=True) for prompt in PROMPTS * 8))
    assert {len(answer.token_ids) for answer in answers} == {8}
    assert {answer.stop_reason for answer in answers} == {"length"}
    for prompt, answer in zip(PROMPTS * 8, answers, strict=True):
        expected = plain_logprobs(server._model, prompt, answer.token_ids, 1.0)
        torch.testing.assert_close(torch.tensor(answer.log_probs), expected, atol=1e-5, rtol=0)


async def test_an_aborted_completion_keeps_its_tokens_and_goes_on_elsewhere(server: TokenServer) -> None:
    running = asyncio.create_task(ask(server, [5, 6], max_tokens=100, ignore_eos=True))
    await asyncio.sleep(0.05)
    await server.abort_all_requests()
    cut = await asyncio.wait_for(running, 5)
    assert cut.stop_reason == "aborted"
    assert 0 < len(cut.token_ids) < 100
    assert len(cut.log_probs) == len(cut.token_ids)

    parked = asyncio.create_task(ask(server, [5, 6, *cut.token_ids], max_tokens=3, ignore_eos=True))
    await asyncio.sleep(0.05)
    assert not parked.done(), "the gate is shut until resume_generation"
    await server.load_weights(server._model.state_dict(), 7)
    await server.resume_generation()
    rest = await asyncio.wait_for(parked, 5)
    assert (rest.stop_reason, len(rest.token_ids), rest.extra_fields) == ("length", 3, {"global_steps": 7})


async def test_a_server_that_leaves_rotation_refuses(server: TokenServer) -> None:
    await server.abort_all_requests(reject_request=True)
    refused = await asyncio.wait_for(ask(server, [5]), 5)
    assert (refused.stop_reason, refused.token_ids) == ("aborted", [])
    await server.resume_generation()
    assert (await ask(server, [5], max_tokens=1)).stop_reason in {"length", "completed"}


async def test_weights_change_between_completions_only() -> None:
    first, second = make_model(seed=0), make_model(seed=1)
    server = TokenServer(make_model(seed=0), eos=(), limits=Limits(prompt=64, response=64, context=128))
    await server.load_weights(first.state_dict(), 1)
    running = asyncio.create_task(ask(server, [5, 6], max_tokens=40))
    await asyncio.sleep(0.02)
    await server.load_weights(second.state_dict(), 2)
    for answer, model, version in ((await running, first, 1), (await ask(server, [5, 6], max_tokens=40), second, 2)):
        assert answer.extra_fields == {"global_steps": version}
        expected = plain_logprobs(model, [5, 6], answer.token_ids, 1.0)
        torch.testing.assert_close(torch.tensor(answer.log_probs), expected, atol=1e-5, rtol=0)


async def test_a_prompt_without_room_and_a_request_with_images_are_refused_by_name(server: TokenServer) -> None:
    with pytest.raises(ValueError, match="128 tokens leaves no room in a context of 128"):
        await ask(server, [5] * 128)
    with pytest.raises(ValueError, match="'r' carries images"):
        await server.generate([5], {}, "r", image_data=["picture"])


async def test_a_failure_of_the_model_reaches_those_who_wait_and_nobody_else(server: TokenServer) -> None:
    with pytest.raises(IndexError):
        await ask(server, [VOCABULARY + 1])
    assert len((await ask(server, [5], max_tokens=2, ignore_eos=True)).token_ids) == 2


async def test_routed_experts_are_told_when_asked_for(server: TokenServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await ask(server, [5, 6], max_tokens=3)).routed_experts is None
    monkeypatch.setenv("VERL_ON_CPU_ROUTED_EXPERTS", "1")
    answer = await ask(server, [5, 6], max_tokens=3)
    fed = [5, 6, *answer.token_ids][:-1]
    assert answer.routed_experts.shape == (len(fed), 2, 2)
    assert (answer.routed_experts == routed_experts(fed)).all()
    assert len({experts.tobytes() for experts in routed_experts(range(8))}) == 8
