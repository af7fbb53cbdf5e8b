"""Logprobs of sampled ids by a plain forward pass: the yardstick for the engine's own.

What the engine reports for a token must be what the weights that sampled it say in one ordinary forward pass, without
a KV cache and without batching tricks. Anything more than rounding means stale weights, stale cache or a token that
was not sampled where it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gymlink.types import Sampling
from gymlink_transformers.engine import as_sampled

LOGIT_ELEMENTS = 2**28
"""Logits held at a time (1 GiB in float32): long rows of a large vocabulary go through in small batches."""


@dataclass(frozen=True, slots=True)
class SampledRow:
    """One training row: `completion_ids`, `logprobs` and `mask` have one length; mask 1 means sampled and trained."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    logprobs: Sequence[float]
    mask: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@torch.no_grad()
def max_logprob_error(model: PreTrainedModel, rows: Sequence[SampledRow], sampling: Sampling) -> float:
    """The largest absolute difference between reported and recomputed logprobs, in nats, over the masked tokens."""
    worst = 0.0
    with as_sampled(model):
        for batch in _batches([row for row in rows if any(row.mask)], len_vocabulary=_vocabulary(model)):
            worst = max(worst, _batch_error(model, batch, sampling))
    return worst


def _batches(rows: Sequence[SampledRow], *, len_vocabulary: int) -> list[list[SampledRow]]:
    batches: list[list[SampledRow]] = []
    for row in sorted(rows, key=len):
        # Sorted, so this row is the batch's longest.
        if batches and (len(batches[-1]) + 1) * len(row) * len_vocabulary <= LOGIT_ELEMENTS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _batch_error(model: PreTrainedModel, rows: Sequence[SampledRow], sampling: Sampling) -> float:
    longest = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    attention = torch.zeros_like(ids)
    sampled = torch.zeros_like(ids, dtype=torch.bool)
    reported = torch.zeros(ids.shape, dtype=torch.float32)
    for index, row in enumerate(rows):
        start, end = len(row.prompt_ids), len(row)
        ids[index, :end] = torch.tensor([*row.prompt_ids, *row.completion_ids])
        attention[index, :end] = 1
        sampled[index, start:end] = torch.tensor(list(row.mask), dtype=torch.bool)
        reported[index, start:end] = torch.tensor(list(row.logprobs), dtype=torch.float32)
    device: Any = model.device
    logits = model(input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False).logits
    # The logits at a position are of the token after it.
    where = sampled[:, 1:].to(device)
    narrow: Any = _warpers(sampling)
    scores = narrow(ids.to(device), logits[:, :-1][where].float())
    tokens = ids[:, 1:].to(device)[where]
    recomputed = scores.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return float((recomputed - reported[:, 1:].to(device)[where]).abs().max())


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """The distribution that was sampled from, in the order in which transformers narrows it down."""
    warpers = LogitsProcessorList()
    if sampling.temperature not in {0.0, 1.0}:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers


def _vocabulary(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size
