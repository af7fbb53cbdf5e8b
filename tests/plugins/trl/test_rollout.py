"""What reaches the trainer: tensors that enter the loss, failures that move nothing, counts that add up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from gymlink.config import parse_settings
from gymlink.errors import ConfigError
from gymlink.types import DropReason, Rollout, RolloutRequest, RolloutStatus, Segment
from gymlink_trl import GymRollout, gym_dataset, gym_reward
from gymlink_trl.quiet import NO_REWARD, TRL_LOGGER
from gymlink_trl.rollout import training_row

SETTINGS = {"gym": {"config_paths": ["keypad.yaml"]}}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


class Watched(GRPOTrainer):
    """Keeps the tensors that enter each loss."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen = [*getattr(self, "seen", []), {k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}]
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.fixture
def make_trainer(
    tmp_path: Path, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, sessions: list[Any]
) -> Callable[..., Watched]:
    def make(rollout: GymRollout, train: Path, evaluate: Path | None = None, **settings: Any) -> Watched:
        config = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 64,
            "learning_rate": 1e-2,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        return Watched(
            model=model,
            reward_funcs=gym_reward,
            args=GRPOConfig(**{**config, **settings}),
            train_dataset=gym_dataset(train),
            eval_dataset=gym_dataset(evaluate) if evaluate else None,
            processing_class=tokenizer,
            rollout_func=rollout,
        )

    return make


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_what_was_sampled_is_what_the_loss_sees(
    make_trainer: Callable[..., Watched], rows_file: Callable[..., Path], sessions: list[Any]
) -> None:
    rollout = GymRollout(parse_settings(SETTINGS), check_logprobs="all")
    trainer = make_trainer(rollout, rows_file("well"), max_steps=3)
    trainer.train()
    (session,) = sessions
    assert len(session.batches) == len(trainer.seen) == 3
    for batch, seen in zip(session.batches, trainer.seen, strict=True):
        given = {
            (*one.segments[0].prompt_ids, *one.segments[0].response_ids): one.segments[0] for one in batch.rollouts
        }
        for index in range(4):
            prompt = seen["prompt_ids"][index][seen["prompt_mask"][index].bool()]
            completion = seen["completion_ids"][index][seen["completion_mask"][index].bool()]
            segment = given[(*prompt.tolist(), *completion.tolist())]
            mask = (seen["completion_mask"] * seen["tool_mask"])[index]
            assert mask.sum() == segment.trained_tokens > 0
            assert seen["tool_mask"][index][: len(completion)].tolist() == list(segment.response_mask)
    assert logged(trainer, "rollout/max_logprob_error") == pytest.approx([0.0] * 3, abs=1e-4)
    assert rollout.max_logprob_error is not None
    assert rollout.max_logprob_error <= 1e-4
    totals = rollout.training
    assert totals.rollouts == 12
    assert totals.tokens_sampled == totals.tokens_trained > 0
    assert [turn.weight_version for batch in session.batches for one in batch.rollouts for turn in one.turns] == [
        version for version in range(3) for _ in range(8)
    ]


def test_a_failed_rollout_moves_nothing(
    make_trainer: Callable[..., Watched], rows_file: Callable[..., Path], sessions: list[Any], monkeypatch: Any
) -> None:
    """One of four siblings fails: it has no advantage and no token, and the others' baseline is their own mean."""
    rollout = GymRollout(parse_settings(SETTINGS))
    trainer = make_trainer(rollout, rows_file("well"), max_steps=1, scale_rewards="none")
    real = type(trainer).compute_loss
    rewards = [0.25, None, 1.0, 0.5]
    mixed(monkeypatch, rewards)
    trainer.train()
    assert type(trainer).compute_loss is real
    (seen,) = trainer.seen
    order = dict(zip(seen["advantages"].tolist(), range(4), strict=True))
    mean = (0.25 + 1.0 + 0.5) / 3
    assert sorted(order) == pytest.approx(sorted([0.25 - mean, 0.0, 1.0 - mean, 0.5 - mean]))
    failed = order[0.0]
    mask = seen["completion_mask"] * seen["tool_mask"]
    assert mask[failed].sum() == 0
    assert seen["completion_ids"][failed][0] == trainer.processing_class.eos_token_id
    assert (mask.sum(1) > 0).sum() == 3
    assert seen["num_items_in_batch"] == mask.sum()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert logged(trainer, "reward") == pytest.approx([mean])
    assert rollout.training.failed == 1
    assert rollout.training.dropped["failed"] > 0
    assert rollout.training.tokens_sampled == rollout.training.tokens_trained + rollout.training.tokens_dropped


def mixed(monkeypatch: Any, rewards: list[float | None]) -> None:
    """Gives the rollouts of a batch these rewards; None fails one."""
    from gymlink.types import RolloutBatch
    from gymlink_trl import rollout as module

    session = module.Session
    plain = session.collect

    def collect(self: Any, requests: Any, **kwargs: Any) -> RolloutBatch:
        requests = [
            replace(request, row={**request.row, "play": "fail"}) if reward is None else request
            for request, reward in zip(requests, rewards, strict=True)
        ]
        batch = plain(self, requests, **kwargs)
        scored = [replace(one, reward=reward) for one, reward in zip(batch.rollouts, rewards, strict=True)]
        return RolloutBatch(scored, batch.metrics)

    monkeypatch.setattr(session, "collect", collect)


def test_a_failure_is_told_in_one_line_and_not_by_the_trainer(
    make_trainer: Callable[..., Watched],
    rows_file: Callable[..., Path],
    sessions: list[Any],
    monkeypatch: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    said: list[str] = []
    trainer = make_trainer(GymRollout(parse_settings(SETTINGS), report=said.append), rows_file("well"), max_steps=1)
    mixed(monkeypatch, [0.25, None, 1.0, 0.5])
    trl_logger = logging.getLogger(TRL_LOGGER)
    trl_logger.addHandler(caplog.handler)
    try:
        trainer.train()
        assert NO_REWARD not in caplog.text
        assert trl_logger.filters == []
        trl_logger.warning("%s for the following kwargs: {'gym_status': 'failed'}", NO_REWARD)
        assert NO_REWARD in caplog.text
    finally:
        trl_logger.removeHandler(caplog.handler)
    assert said[1:] == ["1 of 4 rollouts failed (http: 1); the first: as told"]


@pytest.mark.parametrize("wrong", ["train.jsonl", "eval.jsonl"])
def test_an_agent_that_does_not_run_is_told_before_training(
    make_trainer: Callable[..., Watched], rows_file: Callable[..., Path], sessions: list[Any], wrong: str
) -> None:
    train, evaluate = rows_file("well", "well"), rows_file("well", "well", name="eval.jsonl")
    path = train.with_name(wrong)
    path.write_text(path.read_text().replace("keypad_agent", "keypads_agent", 1))
    rollout = GymRollout(parse_settings(SETTINGS))
    trainer = make_trainer(rollout, train, evaluate, eval_strategy="steps", eval_steps=1)
    with pytest.raises(ConfigError, match=rf"{wrong}:1: no agent 'keypads_agent' runs.*keypad_agent"):
        rollout.prepare(trainer)
    assert [(session.running, session.batches) for session in sessions] == [(False, [])]
    assert rollout.agents == ()


def test_the_agents_that_run_are_known(make_trainer: Callable[..., Watched], rows_file: Callable[..., Path]) -> None:
    with GymRollout(parse_settings(SETTINGS)) as rollout:
        rollout.prepare(make_trainer(rollout, rows_file("well")))
        assert rollout.agents == ("keypad_agent",)


def test_what_is_waited_for_is_said_on_standard_error_unless_a_report_is_given(
    make_trainer: Callable[..., Watched], rows_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with GymRollout(parse_settings(SETTINGS)) as rollout:
        rollout.prepare(make_trainer(rollout, rows_file("well")))
    assert "starting the keypad" in capsys.readouterr().err
    said: list[str] = []
    with GymRollout(parse_settings(SETTINGS), report=said.append) as rollout:
        rollout.prepare(make_trainer(rollout, rows_file("well")))
    assert said == ["starting the keypad"]
    assert capsys.readouterr().err == ""


def test_a_batch_of_failures_leaves_the_weights_alone(
    make_trainer: Callable[..., Watched], rows_file: Callable[..., Path]
) -> None:
    rollout = GymRollout(parse_settings(SETTINGS))
    trainer = make_trainer(rollout, rows_file("fail"), max_steps=1)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())
    assert rollout.training.failed == 4
    assert rollout.training.tokens_trained == 0


def test_of_a_rewritten_history_the_final_branch_is_trained(
    make_trainer: Callable[..., Watched], rows_file: Callable[..., Path], sessions: list[Any]
) -> None:
    rollout = GymRollout(parse_settings(SETTINGS))
    trainer = make_trainer(rollout, rows_file("rewrite"), max_steps=1)
    trainer.train()
    (batch,) = sessions[0].batches
    final = sum(len(one.turns[-1].completion_ids) for one in batch.rollouts)
    (seen,) = trainer.seen
    assert (seen["completion_mask"] * seen["tool_mask"]).sum() == final == rollout.training.tokens_trained
    assert rollout.training.prefix_breaks == 4
    assert rollout.training.tokens_sampled == final + rollout.training.dropped["other_branch"]


def test_a_long_completion_is_cut_and_the_cut_is_counted(
    make_trainer: Callable[..., Watched], rows_file: Callable[..., Path]
) -> None:
    rollout = GymRollout(parse_settings(SETTINGS))
    trainer = make_trainer(rollout, rows_file("well"), max_steps=1, max_completion_length=10)
    trainer.train()
    (seen,) = trainer.seen
    assert seen["completion_ids"].shape[1] <= 10
    trained = int((seen["completion_mask"] * seen["tool_mask"]).sum())
    totals = rollout.training
    assert totals.tokens_trained == trained == logged(trainer, "rollout/tokens_trained")[0]
    assert totals.dropped[DropReason.OVER_LENGTH] == totals.tokens_sampled - trained > 0
    assert logged(trainer, f"rollout/tokens_dropped/{DropReason.OVER_LENGTH}") == [totals.tokens_dropped]


def test_evaluation_is_counted_apart(
    make_trainer: Callable[..., Watched], rows_file: Callable[..., Path], sessions: list[Any]
) -> None:
    rollout = GymRollout(parse_settings(SETTINGS))
    evaluate = rows_file("well", "well", name="eval.jsonl")
    trainer = make_trainer(
        rollout, rows_file("well"), evaluate, max_steps=2, eval_strategy="steps", eval_steps=2, num_generations_eval=2
    )
    trainer.train()
    assert rollout.training.rollouts == 8
    assert rollout.evaluation.rollouts == 4
    assert len(logged(trainer, "eval_reward")) == 1
    assert logged(trainer, "eval_rollout/count") == [4.0]


def test_generation_for_several_steps_and_accumulation(
    make_trainer: Callable[..., Watched], rows_file: Callable[..., Path]
) -> None:
    rollout = GymRollout(parse_settings(SETTINGS), check_logprobs="all")
    trainer = make_trainer(
        rollout,
        rows_file("well", "well"),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_iterations=2,
    )
    trainer.train()
    assert rollout.training.rollouts == 8
    assert rollout.max_logprob_error is not None
    assert rollout.max_logprob_error <= 1e-4


@pytest.mark.parametrize("precision", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_mixed_precision_and_checkpointing(
    make_trainer: Callable[..., Watched], rows_file: Callable[..., Path], precision: dict[str, bool]
) -> None:
    rollout = GymRollout(parse_settings(SETTINGS), check_logprobs="all")
    trainer = make_trainer(rollout, rows_file("well"), **precision)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert rollout.max_logprob_error is not None
    assert rollout.max_logprob_error <= 1e-4
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert any(not torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())


def test_gym_stops_with_the_training_and_with_an_error(
    make_trainer: Callable[..., Watched], rows_file: Callable[..., Path], sessions: list[Any], monkeypatch: Any
) -> None:
    rollout = GymRollout(parse_settings(SETTINGS))
    make_trainer(rollout, rows_file("well"), max_steps=1).train()
    assert [session.running for session in sessions] == [False]

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    trainer = make_trainer(rollout, rows_file("well"), max_steps=1)
    monkeypatch.setattr(type(sessions[0]), "collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [session.running for session in sessions] == [False, False]
    assert trainer.model.training


def request() -> RolloutRequest:
    return RolloutRequest(row={"agent_ref": {"name": "a"}}, index=0)


def rollout_of(*segments: Segment, status: RolloutStatus = RolloutStatus.COMPLETED) -> Rollout:
    return Rollout(request(), "r", status, 1.0, segments=segments)


def test_a_rollout_without_tokens_gets_one_masked_eos() -> None:
    row, cut = training_row(rollout_of(Segment((5, 6), (), (), ())), eos=9, limit=4)
    assert (row.prompt_ids, row.completion_ids, row.mask, row.logprobs, cut) == ([5, 6], [9], [0], [0.0], 0)
    row, cut = training_row(rollout_of(status=RolloutStatus.FAILED), eos=9, limit=None)
    assert (row.prompt_ids, row.completion_ids, row.mask, row.logprobs, cut) == ([9], [9], [0], [0.0], 0)


def test_the_limit_cuts_sampled_and_environment_tokens_alike() -> None:
    segment = Segment((1,), (2, 3, 4, 5, 6), (1, 0, 0, 1, 1), (-1.0, 0.0, 0.0, -2.0, -3.0))
    row, cut = training_row(rollout_of(segment), eos=9, limit=4)
    assert (row.completion_ids, row.mask, row.logprobs, cut) == ([2, 3, 4, 5], [1, 0, 0, 1], [-1.0, 0.0, 0.0, -2.0], 1)
