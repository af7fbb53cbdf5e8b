"""The recorded rollouts through the verl plugin and verl's own steps from the agent loop to the advantages.

The plugin is given the rollouts where its process's worker would collect them. verl's workers run the agent loops and
make the rows, its trainers the advantages; nothing of it needs Ray, but for the V1 trainer's storage, which is in
memory here.
"""

from __future__ import annotations

import asyncio
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tensordict import NonTensorStack, TensorDict

from expected_rows import QUANTITIES, Row, assert_same, expected_rows
from recorded_rollouts import (
    FORKED,
    RESPONSE_LIMIT,
    SIBLINGS,
    UNCOMPARABLE,
    RecordedWorker,
    read_rollouts,
    recorded_tokenizer,
    row_of,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # verl 0.9.1 imports what Ray and others call deprecated
    from transfer_queue import KVBatchMeta
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
    from verl.protocol import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage
    from verl.trainer.ppo.reward import extract_reward
    from verl.trainer.ppo.v1 import agent_loop_tq, trainer_base
    from verl.utils.dataset.rl_dataset import collate_fn

from gymlink.config import GatewaySettings, GymSettings, Settings
from gymlink.host import HostedGym
from gymlink.rollout import Figures, Recorder
from gymlink_ray.job import Job, JobActor
from gymlink_tiny import make_model
from gymlink_verl.dataset import GymDataset
from gymlink_verl.loop import Station
from gymlink_verl.options import read_options
from gymlink_verl.train import compose

EPSILON = 1e-6
"""What verl adds to the standard deviation."""

GROUPS = read_rollouts()
V1_GROUPS = [name for name in GROUPS if name not in UNCOMPARABLE]
LEGACY_GROUPS = [name for name in GROUPS if name != FORKED]
"""The legacy trainer takes one row for a rollout, so the plugin asks for the final branch alone."""
GYM = HostedGym("http://nowhere", "secret", {"agent": "http://nowhere/agent"}, "0.4.0")


class Told(JobActor):
    """The job's actor, which also keeps the figures that it is told. No Gym has to run for it."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(Settings(gym=GymSettings(config_paths=["agent.yaml"])), str(run_dir), GatewaySettings())
        self._host = cast("Any", SimpleNamespace(check=lambda: None))
        self.told: list[Figures] = []

    async def ended(self, split: str, figures: Figures, line: bytes) -> None:
        await super().ended(split, figures, line)
        self.told.append(figures)


class Here:
    """An actor's handle, called here and not through Ray."""

    def __init__(self, actor: object) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


class Process:
    """One process of a verl job, with gymlink's station in it."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        model = folder / "model"
        tokenizer = recorded_tokenizer()
        tokenizer.save_pretrained(model)
        make_model(tokenizer).save_pretrained(model)
        self.end: int = tokenizer.eos_token_id
        self.rows = folder / "rows.jsonl"
        self.rows.write_text("".join(f"{json.dumps(row_of(name))}\n" for name in GROUPS))
        self.config = compose(
            [
                "+gymlink=gym",
                f"data.train_files={self.rows}",
                f"data.max_response_length={RESPONSE_LIMIT}",
                "data.max_prompt_length=64",
                f"actor_rollout_ref.model.path={model}",
                f"actor_rollout_ref.rollout.n={SIBLINGS}",
                "actor_rollout_ref.rollout.name=vllm",
                "algorithm.adv_estimator=grpo",
                *overrides,
            ]
        )
        self.actor = Told(folder / "gym")
        self.options = read_options(self.config, self.end)
        worker = cast("Any", RecordedWorker(GROUPS))
        self.station = Station(
            worker, GYM, Job(Here(self.actor)), self.options, Recorder(folder / "gym" / "rollouts.jsonl")
        )

    def samples(self, groups: Sequence[str]) -> list[dict[str, Any]]:
        """The samples of the plugin's dataset for these groups, each with its group as uid."""
        dataset = GymDataset(str(self.rows), config={"train_files": str(self.rows)})
        every = dict(zip(GROUPS, (dataset[at] for at in range(len(dataset))), strict=True))
        return [{**every[group], "uid": group} for group in groups]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Process]]:
    """Makes a process of a job with these overrides; agent loops find its station."""
    with pytest.MonkeyPatch.context() as patch:

        def make(*overrides: str) -> Process:
            made = Process(tmp_path_factory.mktemp("verl"), *overrides)

            async def of(_: object) -> Station:
                return made.station

            patch.setattr(Station, "of", of)
            patch.setattr(Job, "of", lambda *_: made.station.job)
            return made

        yield make


# The V1 trainer.


class Stored:
    """The part of TransferQueue that the V1 trainer uses here: rows of tensors by key, in memory."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.status: dict[str, str] = {}

    def init(self) -> None:
        pass

    async def async_kv_put(self, key: str, partition_id: str, tag: Mapping[str, Any]) -> None:
        self.status[key] = tag["status"]

    async def async_kv_batch_put(self, keys: list[str], fields: TensorDict, tags: Any, partition_id: str) -> None:
        self.kv_batch_put(keys, partition_id, fields)

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: TensorDict) -> KVBatchMeta:
        for name, values in fields.items():
            each = values.unbind() if isinstance(values, torch.Tensor) else values.tolist()
            for key, value in zip(keys, each, strict=True):
                self.rows.setdefault(key, {})[name] = value
        return self.batch(keys)

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> TensorDict:
        fields: dict[str, Any] = {}
        for name in select_fields:
            values = [self.rows[key][name] for key in keys if name in self.rows[key]]
            if values and isinstance(values[0], torch.Tensor):
                fields[name] = torch.nested.as_nested_tensor(values, layout=torch.jagged)
            elif values:
                fields[name] = NonTensorStack(*values)
        return TensorDict(fields, batch_size=[len(keys)])

    def batch(self, keys: list[str]) -> KVBatchMeta:
        return KVBatchMeta(keys=keys, tags=[{} for _ in keys], partition_id="train")


class V1:
    """A batch as the V1 trainer has it before its actor is updated."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.stored = Stored()
        with pytest.MonkeyPatch.context() as patch:
            for module in (agent_loop_tq, trainer_base):
                patch.setattr(module, "tq", self.stored)
            asyncio.run(self._run())
            keys = list(self.stored.rows)
            for row in self.stored.rows.values():
                row["old_log_probs"] = row["rollout_log_probs"]  # the actor's own, on a real trainer
            trainer = cast("Any", SimpleNamespace(config=process.config))
            trainer_base.PPOTrainer._compute_advantage(trainer, self.stored.batch(keys), metrics={})

    async def _run(self) -> None:
        """As `AgentLoopWorkerTQ.generate_sequences` (verl 0.9.1) does, and waits for the end."""
        made: Any = agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class  # type: ignore[attr-defined]
        worker = made(self.process.config, None)
        rollout = self.process.config.actor_rollout_ref.rollout
        params = {"temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": rollout.top_k}
        about = {"step": 1, "sample_index": 0, "rollout_n": 0, "validate": False}
        agent = {"agent_name": rollout.agent.default_agent_loop, "global_steps": 1}
        prompts = [{**sample, **agent} for sample in self.process.samples(list(GROUPS))]
        async with asyncio.timeout(60):
            await asyncio.gather(*(worker._run_prompt(prompt, params, trajectory=about) for prompt in prompts))

    def rows(self, group: str) -> dict[int, list[Row]]:
        """By the number of the session."""
        rows: dict[int, list[Row]] = {}
        for key, one in self.stored.rows.items():
            uid, session, _ = key.rsplit("_", 2)
            if uid == group:
                rows.setdefault(int(session), []).append(_row(one))
        return rows


def _row(one: Mapping[str, torch.Tensor]) -> Row:
    assert one["loss_mask"].tolist() == one["response_mask"].tolist()
    return Row(
        prompt_ids=tuple(one["prompts"].tolist()),
        response_ids=tuple(one["responses"].tolist()),
        mask=tuple(one["response_mask"].tolist()),
        logprobs=tuple(one["rollout_log_probs"].tolist()),
        reward=float(one["rm_scores"].sum()),
        advantages=tuple(one["advantages"].tolist()),
    )


def expected_of(group: str, end: int) -> list[list[Row]]:
    """verl's rows end with the last trained token."""
    expected = expected_rows(GROUPS[group], limit=RESPONSE_LIMIT, end=end, epsilon=EPSILON)
    return [[row.without_masked_tail for row in rows] for rows in expected]


@pytest.fixture(scope="module")
def v1(process: Callable[..., Process]) -> V1:
    return V1(process())


@pytest.mark.parametrize("group", V1_GROUPS)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_what_the_v1_trainer_trains_is_what_is_expected(v1: V1, group: str, quantity: str) -> None:
    assert v1.stored.status[group] == "finished"
    assert_same(quantity, group, expected_of(group, v1.process.end), v1.rows(group), "verl")


@pytest.mark.parametrize("group", UNCOMPARABLE)
def test_the_v1_trainer_has_no_row_where_nothing_can_be_compared(v1: V1, group: str) -> None:
    assert v1.rows(group) == {}
    assert v1.stored.status[group] == "failure"


def test_what_is_trained_and_what_is_not_add_up_to_what_was_sampled(v1: V1) -> None:
    told = v1.process.actor.told
    for figures in told:
        figures.check_conservation()
    sampled = sum(one.sampled_tokens for siblings in GROUPS.values() for one in siblings)
    assert sum(figures.tokens_sampled for figures in told) == sampled
    trained = sum(int(row["response_mask"].sum()) for row in v1.stored.rows.values())
    assert sum(figures.tokens_trained for figures in told) == trained


# The legacy trainer.


class Legacy:
    """A batch as the legacy trainer has it before its actor is updated."""

    def __init__(self, process: Process, groups: Sequence[str]) -> None:
        self.process, self.groups = process, groups
        samples = DataProto.from_single_dict(collate_fn(process.samples(groups)))
        samples.meta_info["global_steps"] = 1
        asked = samples.repeat(repeat_times=SIBLINGS, interleave=True)
        batch = samples.repeat(repeat_times=SIBLINGS, interleave=True)
        made = asyncio.run(self._run(asked))
        # As `RayPPOTrainer.fit` (verl 0.9.1) goes on.
        batch = batch.union(made)
        batch.batch["token_level_scores"], _ = extract_reward(batch)
        batch.batch["token_level_rewards"] = batch.batch["token_level_scores"]
        algorithm = process.config.algorithm
        self.batch = compute_advantage(
            batch,
            adv_estimator=algorithm.adv_estimator,
            num_repeat=SIBLINGS,
            norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo,
            config=algorithm,
        )

    async def _run(self, asked: DataProto) -> DataProto:
        worker = AgentLoopWorker(self.process.config, cast("Any", None))
        async with asyncio.timeout(60):
            return await worker.generate_sequences(asked)

    def rows(self, group: str) -> dict[int, Row]:
        """By the number of the sibling."""
        [*places] = np.flatnonzero(self.batch.non_tensor_batch["uid"] == group)
        return {index: self._row(at) for index, at in enumerate(places)}

    def _row(self, at: int) -> Row:
        one = {name: value[at] for name, value in self.batch.batch.items()}
        there = one["attention_mask"].bool()
        prompt, response = there[: len(one["prompts"])], there[len(one["prompts"]) :]
        assert not one["response_mask"][~response].any()
        assert not one["advantages"][~response].any()
        return Row(
            prompt_ids=tuple(one["prompts"][prompt].tolist()),
            response_ids=tuple(one["responses"][response].tolist()),
            mask=tuple(one["response_mask"][response].tolist()),
            logprobs=tuple(one["rollout_log_probs"][response].tolist()),
            reward=float(one["rm_scores"].sum()),
            advantages=tuple(one["advantages"][response].tolist()),
        )

    def scored(self, group: str) -> dict[int, list[Row]]:
        return {at: [row] for at, row in self.rows(group).items() if GROUPS[group][at].reward is not None}


@pytest.fixture(scope="module")
def legacy(process: Callable[..., Process]) -> Legacy:
    return Legacy(process("trainer.use_v1=false"), LEGACY_GROUPS)


@pytest.mark.parametrize("group", LEGACY_GROUPS)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_what_the_legacy_trainer_trains_is_what_is_expected(legacy: Legacy, group: str, quantity: str) -> None:
    """With one failure, the others' advantages are larger by the factor that `gymlink.rollout.neutral` tells."""
    expected = expected_of(group, legacy.process.end)
    failed = sum(one.reward is None for one in GROUPS[group])
    factor = math.sqrt((SIBLINGS - 1) / (SIBLINGS - 2)) if failed == 1 else 1.0
    expected = [
        [replace(row, advantages=tuple(factor * one for one in row.advantages)) for row in rows] for rows in expected
    ]
    assert_same(quantity, group, expected, legacy.scored(group), "verl's legacy trainer")


def test_a_failed_rollout_moves_nothing_in_the_legacy_trainer(legacy: Legacy) -> None:
    for group in LEGACY_GROUPS:
        for index, row in legacy.rows(group).items():
            if GROUPS[group][index].reward is None:
                assert (row.mask, row.advantages) == ((0,), (0.0,)), f"{group}/{index}"


def test_only_the_v1_trainer_takes_several_rows_of_a_rollout(v1: V1, legacy: Legacy) -> None:
    assert not v1.process.options.one_row
    assert legacy.process.options.one_row


@pytest.mark.parametrize("groups", [["all_failed", "plain"], ["plain", "all_failed"]], ids=" then ".join)
def test_a_group_that_failed_first_is_neutral_in_the_legacy_trainer(
    process: Callable[..., Process], groups: Sequence[str]
) -> None:
    rows = Legacy(process("trainer.use_v1=false"), groups).rows("all_failed")
    assert {row.mask for row in rows.values()} == {(0,)}
    assert len({row.reward for row in rows.values()}) == 1
