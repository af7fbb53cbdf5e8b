"""A rollout takes the room of what it adds, and not of turns times history."""

from __future__ import annotations

import gc
import tracemalloc

import pytest

from gymlink.align import RolloutRecord, build_segments
from gymlink.types import Generation, Turn

SAMPLED, OBSERVED = 256, 256
MOST_BYTES_A_TOKEN = 16


class LetterFormat:
    """A format whose text is a token for each letter, so that little else than ids takes room."""

    name = "letters"
    stop_token_ids = (0,)
    writes_tools = True

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def decode(self, ids: object) -> str:
        return bytes(ids).decode()

    def render(self, messages, tools=(), *, template_args=None) -> tuple[int, ...]:
        return self.encode("".join(message["content"] for message in messages))

    def extend(self, prompt_ids, completion_ids, finish_reason, new_messages, *_, **__) -> tuple[int, ...]:
        return (300,) * OBSERVED


def play(turns: int) -> RolloutRecord:
    record, messages = RolloutRecord("r", LetterFormat()), [{"role": "user", "content": "q" * SAMPLED}]
    for turn in range(turns):
        plan = record.plan(messages)
        ids = list(range(1000, 1000 + SAMPLED))
        answer = {"role": "assistant", "content": f"answer {turn}"}
        record.add(plan, Generation(ids, [-0.5 - one for one in ids], "stop"), answer)
        messages = [*messages, answer, {"role": "user", "content": f"more {turn}"}]
    return record


@pytest.mark.parametrize("turns", [40, 160])
def test_a_record_is_linear_in_the_tokens_of_its_rollout(turns: int) -> None:
    play(2)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        record = play(turns)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    tokens = record.turns[-1].tokens
    assert tokens >= turns * (SAMPLED + OBSERVED) - OBSERVED
    assert held / tokens < MOST_BYTES_A_TOKEN


def test_each_id_is_held_once() -> None:
    turns = play(30).turns
    assert sum(len(turn.added_ids) + len(turn.completion_ids) for turn in turns) == turns[-1].tokens
    assert [turn.parent for turn in turns] == [None, *range(29)]
    whole: tuple[int, ...] = ()
    for turn in turns:
        assert turn.prompt_ids[: len(whole)] == whole
        assert turn.prompt_tokens == len(turn.prompt_ids)
        whole = tuple(turn.ids)
    (segment,), _ = build_segments(turns, on_history_rewrite="fork")
    assert segment.prompt_ids + segment.response_ids == whole


def test_a_turn_shares_the_ids_of_its_generation() -> None:
    record = RolloutRecord("r", LetterFormat())
    generation = Generation((1, 2), (-0.5, -0.5), "stop")
    turn: Turn = record.add(record.plan([{"role": "user", "content": "q"}]), generation, {"role": "assistant"})
    assert turn.completion_ids is generation.token_ids
    assert turn.logprobs is generation.logprobs
