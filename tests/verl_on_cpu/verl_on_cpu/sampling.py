"""Generation with a transformers model: a batch of prompts, left-padded, one KV cache, rows leave when they are done.

The log-probability of a sampled token is that of the distribution it was drawn from: after temperature, top_k and top_p
(vLLM's "processed_logprobs", verl's default). Nothing here knows verl or Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

# What verl's agent loops always send; anything but the neutral value would change what is sampled.
_NEUTRAL = {"repetition_penalty": 1.0, "n": 1, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass(frozen=True)
class Sampling:
    """How one completion is sampled.

    `temperature` 0 takes the likeliest token; `top_k` below 1 and `top_p` 1 cut nothing. A sampled id in `stop` ends
    the completion and is its last id.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop: frozenset[int] = frozenset()

    @classmethod
    def read(cls, params: Mapping[str, Any], *, max_tokens: int, limit: int, eos: Iterable[int]) -> Sampling:
        """From a dict in vLLM's or SGLang's words.

        `max_tokens` holds where the dict has none, and `limit` always. The ids in `eos` stop, besides those in
        `stop_token_ids`, unless `ignore_eos` is true.

        Raises:
            ValueError: a parameter that would change what is sampled, and that is not known here.
        """
        given = {name: value for name, value in params.items() if value is not None}
        given.pop("logprobs", None)  # the server's matter
        wanted = int(given.pop("max_tokens", given.pop("max_new_tokens", max_tokens)))
        stop = frozenset(given.pop("stop_token_ids", ())) | (
            frozenset() if given.pop("ignore_eos", False) else set(eos)
        )
        known = {name: given.pop(name) for name in ("temperature", "top_p", "top_k") if name in given}
        if odd := {name: value for name, value in given.items() if _NEUTRAL.get(name) != value}:
            raise ValueError(f"this engine samples with temperature, top_p and top_k only; it was also sent {odd!r}")
        return cls(max(1, min(wanted, limit)), stop=stop, **known)


@dataclass
class Row:
    """One completion under way: what has been sampled so far, and why it ended (None while it has not)."""

    prompt: Sequence[int]
    sampling: Sampling
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: str | None = None

    def take(self, token: int, logprob: float) -> None:
        """Append a sampled token; it may be the last."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in self.sampling.stop:
            self.ended = "completed"
        elif len(self.ids) >= self.sampling.max_tokens:
            self.ended = "length"


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    generator: torch.Generator | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> None:
    """Sample until every row has ended; once `interrupted()` is true, the rest end as "aborted" with what they have."""
    alive = list(rows)
    inputs, mask = _left_padded([row.prompt for row in alive])
    cache = DynamicCache(config=model.config)
    while alive and not interrupted():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        logits = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens, logprobs = _sample(logits.float(), [row.sampling for row in alive], generator)
        for row, token, logprob in zip(alive, tokens.tolist(), logprobs.tolist(), strict=True):
            row.take(token, logprob)
        kept = torch.tensor([index for index, row in enumerate(alive) if row.ended is None], dtype=torch.long)
        if len(kept) < len(alive):
            alive = [row for row in alive if row.ended is None]
            cache.batch_select_indices(kept)
        inputs = tokens[kept].unsqueeze(-1)
        mask = torch.cat([mask[kept], mask.new_ones(len(kept), 1)], dim=-1)
    for row in alive:
        row.ended = "aborted"


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both [rows, longest prompt]; what stands in the padding is never attended to."""
    longest = max(map(len, prompts), default=0)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], dtype=torch.long)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], dtype=torch.long)
    return ids, mask


def _sample(
    logits: torch.Tensor, samplings: Sequence[Sampling], generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row of logits [rows, vocabulary], with its log-probability; both are [rows]."""
    logprobs = torch.stack([distribution(row, sampling) for row, sampling in zip(logits, samplings, strict=True)])
    drawn = torch.multinomial(logprobs.exp(), 1, generator=generator)
    greedy = torch.tensor([sampling.temperature == 0 for sampling in samplings]).unsqueeze(-1)
    tokens = torch.where(greedy, logprobs.argmax(-1, keepdim=True), drawn)
    return tokens.squeeze(-1), logprobs.gather(-1, tokens).squeeze(-1)


def distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities [vocabulary] that a token is drawn from; with temperature 0, the model's own."""
    if sampling.temperature == 0:
        return logits.log_softmax(-1)
    scaled = logits / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scaled.softmax(-1).sort(descending=True)
        outside = (ordered.cumsum(-1) - ordered) >= sampling.top_p  # the token that reaches top_p is inside
        scaled = scaled.masked_fill(torch.zeros_like(outside).scatter(0, order, outside), -torch.inf)
    return scaled.log_softmax(-1)
