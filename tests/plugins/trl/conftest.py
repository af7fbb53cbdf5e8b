"""A tiny model and tokenizer, and a session whose environment runs in the test's own process.

`KeypadSession` stands where `gymlink.session.Session` stands and plays the keypad without Gym's servers: the engine,
the chat template, alignment and the trainer are real. A row's key `play` says how its rollout goes.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from gymlink.align import build_segments
from gymlink.config import Settings
from gymlink.engines.base import Engine
from gymlink.types import ForkCause, Rollout, RolloutBatch, RolloutRequest, RolloutStatus, Sampling, Turn
from gymlink_tiny import make_model, make_tokenizer

torch.set_num_threads(1)

DIGITS = set("0123456789")
TOKENS_A_TURN = 8


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    return make_model(tokenizer)


class KeypadSession:
    """Plays two turns of the keypad for each request, all at a time, on an event loop of its own."""

    opened: ClassVar[list[KeypadSession]] = []

    def __init__(
        self,
        settings: Settings,
        *,
        tokenizer: Any,
        engine: Engine,
        sampling: Sampling,
        run_dir: Path,
        report: Callable[[str], None],
        peers: Any = None,
    ) -> None:
        self.settings, self.tokenizer, self.engine = settings, tokenizer, engine
        self.peers = peers
        self.report = report
        self.agents = ("keypad_agent",)
        self.gym_version = "none"
        self.running = False
        self.batches: list[RolloutBatch] = []
        KeypadSession.opened.append(self)

    def start(self) -> None:
        self.report("starting the keypad")
        self.running = True

    def stop(self) -> None:
        self.running = False

    def collect(self, requests: Sequence[RolloutRequest], *, sampling: Sampling | None = None) -> RolloutBatch:
        assert self.running
        assert sampling is not None
        box: list[list[Rollout]] = []

        async def play_all() -> list[Rollout]:
            return await asyncio.gather(*(self.play(request, sampling) for request in requests))

        thread = threading.Thread(target=lambda: box.append(asyncio.run(play_all())))
        thread.start()
        thread.join()
        batch = RolloutBatch(box[0], {"rollout/count": float(len(requests))})
        self.batches.append(batch)
        return batch

    async def play(self, request: RolloutRequest, sampling: Sampling) -> Rollout:
        how = request.row.get("play", "well")
        turns = await self.turns(request, sampling, rewrite=how == "rewrite")
        sampled = sum(len(turn.completion_ids) for turn in turns)
        if how == "fail":
            return Rollout(
                request,
                "r",
                RolloutStatus.FAILED,
                None,
                turns=turns,
                failure="http",
                detail="as told",
                sampled_tokens=sampled,
                dropped={"failed": sampled},
            )
        rewrites = self.settings.alignment.on_history_rewrite
        segments, dropped = build_segments(turns, on_history_rewrite=rewrites)
        share = [self.score(turn) for turn in turns]
        return Rollout(
            request,
            "r",
            RolloutStatus.COMPLETED,
            sum(share) / len(share),
            segments=segments,
            turns=turns,
            sampled_tokens=sampled,
            dropped=dropped,
            response={"reward": 0.0},
        )

    async def turns(self, request: RolloutRequest, sampling: Sampling, *, rewrite: bool) -> tuple[Turn, ...]:
        asked = request.row["responses_create_params"]["input"]
        prompt = self.render([{"role": "user", "content": asked}] if isinstance(asked, str) else asked)
        limit = min(sampling.max_tokens or TOKENS_A_TURN, TOKENS_A_TURN)
        bounded = Sampling(sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, limit)
        turns: list[Turn] = []
        for index in range(2):
            cause = ForkCause.EDITED if rewrite and index else None
            said = await self.engine.generate(
                prompt, bounded, stop_token_ids=[self.tokenizer.eos_token_id], rollout_id=f"{request.index}-{index}"
            )
            extends = turns[-1] if index and not cause else None
            turns.append(
                Turn(
                    prompt[extends.tokens if extends else 0 :],
                    said.token_ids,
                    said.logprobs,
                    said.finish_reason,
                    said.weight_version,
                    extends=extends,
                    cause=cause,
                    index=index,
                )
            )
            more = self.tokenizer("\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
            prompt = [*prompt, *said.token_ids, *more]
            if rewrite:
                prompt = prompt[1:]
        return tuple(turns)

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        return ids

    def score(self, turn: Turn) -> float:
        typed = "".join(self.tokenizer.decode(turn.completion_ids, skip_special_tokens=True).split())
        return sum(one in DIGITS for one in typed) / max(4, len(typed))


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[KeypadSession]:
    """Makes `GymRollout` open `KeypadSession`s; the list of those that it opened."""
    KeypadSession.opened = []
    monkeypatch.setattr("gymlink_trl.rollout.Session", KeypadSession)
    return KeypadSession.opened


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes Gym rows, one for each way to play."""

    def write(*plays: str, name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        lines = [
            json.dumps(
                {
                    "responses_create_params": {"input": f"door {index}"},
                    "agent_ref": {"name": "keypad_agent"},
                    "play": play,
                }
            )
            for index, play in enumerate(plays)
        ]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write
