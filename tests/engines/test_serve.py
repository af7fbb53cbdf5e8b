"""`gymlink serve` over two real vLLM servers: a trainer's whole way, with new weights in the middle of a rollout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI

from gymlink.client import GatewayClient
from gymlink.config import PolicySettings
from gymlink.serve.program import ServeRequest, serving
from gymlink.types import Sampling
from vllm_server import VllmServer

pytestmark = [pytest.mark.slow]

LARGEST_ERROR = 2e-5
USER = {"role": "user", "content": "the quick brown fox"}
MORE = {"role": "user", "content": "jumps"}


@pytest.fixture
def gateway(servers: tuple[VllmServer, ...], models: Any, tmp_path: Path) -> Iterator[GatewayClient]:
    request = ServeRequest(
        engine="vllm",
        model=str(models[0].folder),
        settings=PolicySettings(),
        run_dir=tmp_path,
        urls=tuple(server.url for server in servers),
        sampling=Sampling(max_tokens=12),
    )
    with serving(request, lambda _: None) as running, GatewayClient(running.url, running.secret) as client:
        try:
            yield client
        finally:
            client.load_weights(str(models[0].folder), version=0)  # as the other tests of this folder expect them


def test_a_rollout_across_an_update_has_the_logprobs_of_both_weights(gateway: GatewayClient, models: Any) -> None:
    with gateway.rollout() as rollout, OpenAI(base_url=rollout.base_url, api_key=rollout.api_key) as policy:
        said = policy.chat.completions.create(model="policy", messages=[USER]).choices[0].message
        assert gateway.load_weights(str(models[1].folder)) == 1
        policy.chat.completions.create(model="policy", messages=[USER, said, MORE])
    assert rollout.closed is not None
    assert [turn.weight_version for turn in rollout.closed.turns] == [0, 1]
    assert [turn.parent for turn in rollout.closed.turns] == [None, 0]
    (segment,) = rollout.segments
    first = rollout.closed.turns[0].completion_tokens
    assert first + rollout.closed.turns[1].completion_tokens == segment.trained_tokens == rollout.closed.sampled_tokens

    old, new = (logprobs(model, segment) for model in models)
    sampled = torch.tensor(segment.response_mask, dtype=torch.bool)
    of_first = sampled & (torch.arange(len(sampled)) < first)
    of_second = sampled & ~of_first
    told = torch.tensor(segment.response_logprobs)
    assert float((old - told)[of_first].abs().max()) < LARGEST_ERROR
    assert float((new - told)[of_second].abs().max()) < LARGEST_ERROR
    assert float((old - told)[of_second].abs().max()) > 100 * LARGEST_ERROR


def logprobs(model: Any, segment: Any) -> torch.Tensor:
    """Those of the response, by a plain forward pass."""
    ids = torch.tensor([[*segment.prompt_ids, *segment.response_ids]])
    start = len(segment.prompt_ids)
    with torch.no_grad():
        scores = model.network(ids).logits[0, start - 1 : -1].log_softmax(-1)
    return scores.gather(-1, ids[0, start:, None])[:, 0]
