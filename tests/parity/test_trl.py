"""The recorded rollouts through the TRL plugin and a real GRPOTrainer: what enters its loss is what is expected.

All groups are one batch of one training step. The plugin is given the rollouts where its session would collect them;
generation, scoring, padding and advantages are the trainer's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from expected_rows import QUANTITIES, Row, assert_same, expected_rows
from gymlink.config import Settings, parse_settings
from gymlink.types import RolloutBatch, RolloutRequest, Sampling
from gymlink_tiny import make_model
from gymlink_trl import GymRollout, gym_dataset, gym_reward
from recorded_rollouts import FORKED, RESPONSE_LIMIT, SIBLINGS, read_rollouts, recorded_tokenizer, row_of

EPSILON = 1e-4
"""What TRL adds to the standard deviation."""

GROUPS = {name: siblings for name, siblings in read_rollouts().items() if name != FORKED}
"""TRL takes one row for a rollout, so the plugin never asks for more than one branch of it."""

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


class Watched(GRPOTrainer):
    """Keeps the tensors that enter the loss."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen = {name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)}
        return super().compute_loss(model, inputs, *args, **kwargs)


class Step:
    """One training step. Stands where the plugin's session stands, and hands it the recorded rollouts."""

    agents = ("agent",)
    gym_version = "none"

    def __init__(self, folder: Path) -> None:
        rows = folder / "rows.jsonl"
        rows.write_text("".join(f"{json.dumps(row_of(name))}\n" for name in GROUPS))
        tokenizer = recorded_tokenizer()
        self.end: int = tokenizer.eos_token_id
        self._names: list[tuple[str, int]] = []
        self._given: dict[str, Any] = {}
        self._rewards: list[float | None] = []
        self.rollout = GymRollout(
            parse_settings({"gym": {"config_paths": ["agent.yaml"]}}), check_logprobs="off", report=lambda _: None
        )
        self.trainer = Watched(
            model=make_model(tokenizer),
            reward_funcs=self._reward,
            args=GRPOConfig(
                output_dir=str(folder / "out"),
                use_cpu=True,
                bf16=False,
                per_device_train_batch_size=SIBLINGS * len(GROUPS),
                num_generations=SIBLINGS,
                max_completion_length=RESPONSE_LIMIT,
                max_steps=1,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=gym_dataset(rows),
            processing_class=tokenizer,
            rollout_func=self._collect,
        )
        self._rows: dict[tuple[str, int], Row] = {}

    def run(self) -> None:
        self.trainer.train()
        self._rows = self._by_name()

    def open_session(self, settings: Settings, **_: Any) -> Step:
        assert settings.alignment.on_history_rewrite == "last"
        return self

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def collect(self, requests: Sequence[RolloutRequest], *, sampling: Sampling | None = None) -> RolloutBatch:
        """A row gets its group's rollouts, one after the other."""
        rollouts = []
        for request in requests:
            name = request.row["responses_create_params"]["input"]
            index = sum(name == seen for seen, _ in self._names)
            self._names.append((name, index))
            rollouts.append(replace(GROUPS[name][index], request=request))
        return RolloutBatch(rollouts, {})

    def _collect(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        self._given = self.rollout(prompts, trainer)
        return self._given

    def _reward(self, **given: Any) -> list[float | None]:
        self._rewards = gym_reward(**given)
        return self._rewards

    def _by_name(self) -> dict[tuple[str, int], Row]:
        """Each rollout's row of the loss: TRL shuffles them, so a row is known by its ids."""
        rows: dict[tuple[Any, Any], list[Row]] = {}
        for row in map(self._row, range(len(self._names))):
            rows.setdefault((row.prompt_ids, row.response_ids), []).append(row)
        keys = zip(map(tuple, self._given["prompt_ids"]), map(tuple, self._given["completion_ids"]), strict=True)
        return {
            name: replace(rows[key].pop(), reward=reward)
            for name, key, reward in zip(self._names, keys, self._rewards, strict=True)
        }

    def _row(self, at: int) -> Row:
        one = {name: value[at] for name, value in self.trainer.seen.items() if value.ndim}
        there = one["completion_mask"].bool()
        mask = (one["completion_mask"] * one["tool_mask"])[there]
        return Row(
            prompt_ids=tuple(one["prompt_ids"][one["prompt_mask"].bool()].tolist()),
            response_ids=tuple(one["completion_ids"][there].tolist()),
            mask=tuple(mask.tolist()),
            logprobs=tuple(one["sampling_per_token_logps"][there].tolist()),
            reward=None,
            advantages=tuple((one["advantages"] * mask).tolist()),
        )

    def scored(self, group: str) -> dict[int, list[Row]]:
        return {at: [row] for (name, at), row in self._rows.items() if name == group and row.reward is not None}

    def failed(self) -> dict[tuple[str, int], Row]:
        return {name: row for name, row in self._rows.items() if row.reward is None}


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Step:
    made = Step(tmp_path_factory.mktemp("trl"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gymlink_trl.rollout.Session", made.open_session)
        made.run()
    return made


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_what_enters_the_loss_is_what_is_expected(step: Step, group: str, quantity: str) -> None:
    expected = expected_rows(GROUPS[group], limit=RESPONSE_LIMIT, end=step.end, epsilon=EPSILON)
    assert_same(quantity, group, expected, step.scored(group), "TRL")


def test_a_failed_rollout_moves_nothing(step: Step) -> None:
    failed = {(name, at) for name, siblings in GROUPS.items() for at, one in enumerate(siblings) if one.reward is None}
    assert set(step.failed()) == failed
    for name, row in step.failed().items():
        assert (row.mask, row.advantages, row.logprobs) == ((0,), (0.0,), (0.0,)), name


def test_the_mean_reward_is_that_of_the_scored(step: Step) -> None:
    rewards = [one.reward for siblings in GROUPS.values() for one in siblings if one.reward is not None]
    [logged] = [entry["reward"] for entry in step.trainer.state.log_history if "reward" in entry]
    assert logged == pytest.approx(sum(rewards) / len(rewards))


def test_what_is_trained_and_what_is_not_add_up_to_what_was_sampled(step: Step) -> None:
    totals = step.rollout.training
    assert totals.tokens_sampled == sum(one.sampled_tokens for siblings in GROUPS.values() for one in siblings)
    assert totals.tokens_sampled == totals.tokens_trained + totals.tokens_dropped
    assert totals.tokens_trained == sum(sum(row.mask) for name in GROUPS for [row] in step.scored(name).values())
