"""The executor as OpenRLHF makes and calls it: what becomes of a failed rollout, and what is told and written of each.

Rollouts are told here and not collected; the executor, its groups, the rows, the job's bookkeeping and OpenRLHF's call
of an agent are real. There is no Ray: the job's actor is called in process.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase
from vllm import SamplingParams

from gymlink.errors import ConfigError, GymStartError, RolloutError
from gymlink.types import DropReason, Rollout, RolloutRequest, RolloutStatus, Sampling
from gymlink_openrlhf.convert import Sample, placeholder, sample_of
from openrlhf_actor import GYM, Actor, Worker
from openrlhf_rollouts import ROW, failed, scored, turn

LABEL = json.dumps({**ROW, "gymlink": {"index": 7, "split": "train"}})
EVALUATION = LABEL.replace('"train"', '"val"')
PROMPT = "agent: go"
MAX_LENGTH = 64

BROKE = failed([turn((9,), (8, 8))])
"""A failed rollout that sampled two tokens before."""
STAND_IN = placeholder((9,), 8, -0.25)
SILENT = failed()
SPEECHLESS = scored(0.25, [turn((1, 2), ())], status=RolloutStatus.TRUNCATED)
"""Scored, and without a token: the prompt left no room, for instance."""

Outcome = float | Rollout | Exception
"""How a rollout goes: its reward, what it is, or what is raised instead."""


class Outcomes(Worker):
    """The outcomes come in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: list[Outcome] = []
        self.asked: list[tuple[RolloutRequest, Sampling]] = []

    async def rollout(self, request: RolloutRequest, *, sampling: Sampling) -> Rollout:
        number = len(self.asked)
        self.asked.append((request, sampling))
        outcome = self.outcomes[number]
        await asyncio.sleep(0.001 * (len(self.outcomes) - number))  # the first to begin ends last
        if isinstance(outcome, Exception):
            raise outcome
        made = outcome if isinstance(outcome, Rollout) else scored(outcome)
        return replace(made, request=request, rollout_id=f"0.{number}")


class Bench(Actor):
    """A rollout actor whose rollouts go as told."""

    worker: Outcomes

    async def group(self, *outcomes: Outcome, label: Any = LABEL, **more: Any) -> list[dict[str, Any]]:
        """One prompt with a sibling for each outcome: what is told of each."""
        self.worker.outcomes += outcomes
        return await self.respond(label, len(outcomes), prompt=more.pop("prompt", PROMPT), **more)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What was written, in the order of the rollouts."""
        lines = [json.loads(line) for line in (self.run_dir / "rollouts.jsonl").read_text().splitlines()]
        return sorted(lines, key=lambda line: int(line["rollout_id"].partition(".")[2]))

    @property
    def error(self) -> str:
        return (self.run_dir / "error.txt").read_text()


@pytest.fixture
def bench(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Bench]]:
    """Makes a rollout actor in a job with these flags; that no group was left behind is checked in the end."""
    made: list[Bench] = []

    def make(*flags: str, start: bool = True) -> Bench:
        made.append(Bench(tmp_path, flags, tokenizer, Outcomes(), monkeypatch))
        if start:
            made[-1].start()
        return made[-1]

    yield make
    for one in made:
        assert one.executor is None or one.executor._siblings._groups == {}


GRPO = ("--algo.advantage.estimator", "group_norm", "--rollout.n_samples_per_prompt", "4")
FILTERING = (*GRPO, "--algo.dynamic_filtering_enable")
SMALL = (*GRPO, "--rollout.batch_size", "2")


def of(told: Sequence[Mapping[str, Any]], field: str) -> list[Any]:
    return [one[field] for one in told]


def samples(told: Sequence[Mapping[str, Any]]) -> list[Sample]:
    return [
        Sample(one["observation_tokens"], one["action_ranges"], one["rollout_log_probs"], one["truncated"])
        for one in told
    ]


async def test_the_scored_are_told_as_they_are_and_the_failed_are_stood_for(bench: Callable[..., Bench]) -> None:
    actor = bench(*GRPO)
    told = await actor.group(1.0, BROKE, 0.0, SILENT)
    assert samples(told) == [sample_of(scored(1.0)), STAND_IN, sample_of(scored(0.0)), STAND_IN]
    rewards = of(told, "reward")
    assert rewards[::2] == [1.0, 0.0]
    assert sum(rewards[1::2]) == pytest.approx(1.0), "the mean is that of the scored"
    assert rewards[1] != rewards[3], "the spread too"
    assert of(told, "scores") == [1.0, 0.5, 0.0, 0.5]
    assert [one["extra_logs"]["gym_failed"] for one in told] == [0, 1, 0, 1]
    assert all((one["prompt"], one["label"], one["images"]) == (PROMPT, LABEL, None) for one in told)
    assert sum(figures.tokens_trained for _, figures in actor.job.told) == 6


async def test_how_a_rollout_is_asked_for(bench: Callable[..., Bench]) -> None:
    actor = bench(*GRPO)
    await actor.group(1.0, 0.0)
    for request, sampling in actor.worker.asked:
        assert (request.row, request.index) == (ROW, 7), "the row without what is gymlink's own"
        assert sampling == Sampling(0.5, 1.0, 0, max_tokens=6)
    assert len({request.group for request, _ in actor.worker.asked}) == 1


async def test_an_actor_has_one_worker_in_the_jobs_gym(bench: Callable[..., Bench]) -> None:
    actor = bench(*GRPO)
    await asyncio.gather(actor.group(1.0, 0.0), actor.group(1.0, 0.0))
    await actor.group(1.0)
    assert actor.worker.made["settings"].alignment.on_history_rewrite == "last"
    assert actor.worker.made["tokenizer"] is actor.tokenizer
    assert actor.worker.made["engine"].max_context == MAX_LENGTH
    assert actor.worker.joined == {"gym": GYM, "owner": 5, "secret": "secret"}
    assert actor.job.host.enlisted == ["http://here/secret"]


async def test_the_job_begins_with_the_executor(bench: Callable[..., Bench]) -> None:
    """So Gym starts while vLLM does; and failures are judged over a batch of OpenRLHF's."""
    actor = bench(*SMALL)
    await asyncio.sleep(0.01)
    assert (actor.run_dir / "gym.json").exists()
    assert actor.job._neutral.batch == 8


async def test_a_group_that_failed_whole_moves_nothing(bench: Callable[..., Bench]) -> None:
    """What it gets is the mean of the latest, as a number whose mean float32 can tell."""
    actor = bench(*GRPO)
    await actor.group(0.1, 0.1, 0.1)
    told = await actor.group(SILENT, BROKE, SILENT, BROKE)
    assert samples(told) == [STAND_IN] * 4
    [reward] = set(of(told, "reward"))
    assert reward == pytest.approx(0.1, abs=1e-4)
    assert (reward * 2**18).is_integer()
    assert of(told, "scores") == pytest.approx([0.1] * 4)


async def test_a_group_that_fails_first_waits_for_one_that_is_scored(bench: Callable[..., Bench]) -> None:
    actor = bench(*GRPO)
    none, some = await asyncio.gather(actor.group(BROKE, BROKE), actor.group(0.5, 1.0))
    assert of(none, "reward") == of(none, "scores") == [0.75, 0.75]
    assert of(some, "reward") == [0.5, 1.0]


async def test_where_everything_fails_the_run_ends(bench: Callable[..., Bench]) -> None:
    actor = bench(*GRPO)
    with pytest.raises(RolloutError, match=r"No training rollout could be scored\. 3 of 3 .*the door is stuck"):
        await actor.group(BROKE, BROKE, BROKE)
    assert actor.error.startswith("RolloutError: No training rollout could be scored.")


async def test_where_too_many_fail_the_run_ends(bench: Callable[..., Bench]) -> None:
    """A batch is of eight."""
    actor = bench(*SMALL)
    await actor.group(1.0, BROKE, BROKE, BROKE)
    with pytest.raises(RolloutError, match="6 of 8 rollouts failed"):
        await actor.group(1.0, BROKE, BROKE, BROKE)
    assert "6 of 8 rollouts failed" in actor.error


async def test_one_scored_alone_is_not_trained(bench: Callable[..., Bench]) -> None:
    """It is stood for too: its tokens would be in losses that know no advantage."""
    actor = bench(*GRPO)
    told = await actor.group(BROKE, 0.7, BROKE, BROKE)
    assert samples(told) == [STAND_IN] * 4
    assert len(set(of(told, "reward"))) == 1
    assert of(told, "scores") == [0.7] * 4
    trained = [(figures.tokens_trained, dict(figures.dropped)) for _, figures in actor.job.told]
    assert sorted(trained, key=str) == [(0, {DropReason.ALONE_IN_GROUP: 3}), *[(0, {"failed": 2})] * 3]


@pytest.mark.parametrize("estimator", ["gae", "reinforce", "flash_reinforce"])
async def test_one_alone_is_trained_where_nothing_is_compared(bench: Callable[..., Bench], estimator: str) -> None:
    told = await bench("--algo.advantage.estimator", estimator).group(BROKE, 0.7)
    assert samples(told) == [STAND_IN, sample_of(scored(0.7))]
    assert of(told, "reward") == of(told, "scores") == [0.7, 0.7]


async def test_a_scored_rollout_without_a_token_is_no_baseline(bench: Callable[..., Bench]) -> None:
    """Nothing can be learnt by it; and OpenRLHF ends with a sample in which nothing is to train."""
    told = await bench(*GRPO).group(SPEECHLESS, 1.0, 0.0)
    assert samples(told)[0] == placeholder((1, 2), 3, -0.25)
    assert of(told, "reward") == of(told, "scores") == [0.5, 1.0, 0.0]


async def test_where_nothing_was_sampled_one_token_is(bench: Callable[..., Bench]) -> None:
    actor = bench(*GRPO)
    await actor.group(1.0, 0.0)
    told = await actor.group(SILENT, SPEECHLESS)
    ids = actor.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    assert samples(told) == [placeholder(ids, 3, -0.75)] * 2
    [(prompt, params)] = actor.asked
    assert (prompt, params.max_tokens, params.temperature) == (ids, 1, 0.5)


async def test_a_prompt_longer_than_the_context_is_cut_for_that(bench: Callable[..., Bench]) -> None:
    actor = bench(*GRPO)
    await actor.group(1.0)
    for prompt, size in (("go " * MAX_LENGTH, MAX_LENGTH - 1), ("", 1)):
        [told] = await actor.group(SILENT, prompt=prompt)
        assert len(told["observation_tokens"]) == size + 1


async def test_without_importance_sampling_no_logprobs_are_told(bench: Callable[..., Bench]) -> None:
    told = await bench(*GRPO).group(1.0, BROKE, 0.0, logprobs=None)
    assert of(told, "rollout_log_probs") == [None] * 3


# Dynamic filtering.


async def test_filtering_leaves_out_what_cannot_be_compared(bench: Callable[..., Bench]) -> None:
    """A score that is no number is in no range: OpenRLHF takes another prompt instead."""
    actor = bench(*FILTERING)
    assert of(await actor.group(0.5, 0.7, BROKE), "scores") == pytest.approx([0.5, 0.7, 0.6])
    assert math.isnan(sum(of(await actor.group(0.5, BROKE, BROKE), "scores")))
    assert all(map(math.isnan, of(await actor.group(BROKE, BROKE), "scores")))
    dropped = [reason for _, figures in actor.job.told for reason in figures.dropped]
    assert sorted(dropped) == sorted([DropReason.ALONE_IN_GROUP, *["failed"] * 5])


async def test_what_filtering_leaves_out_is_counted(bench: Callable[..., Bench]) -> None:
    actor = bench(*FILTERING)
    told = await actor.group(1.0, 1.0)
    assert samples(told) == [sample_of(scored(1.0))] * 2
    assert [dict(figures.dropped) for _, figures in actor.job.told] == [{DropReason.FILTERED: 3}] * 2


# Evaluation.


async def test_evaluation_tells_every_score(bench: Callable[..., Bench]) -> None:
    """Also of a rollout without a token, which training leaves out, and of one whose siblings all failed."""
    actor = bench(*FILTERING)
    told = await actor.group(SPEECHLESS, 1.0, BROKE, label=EVALUATION)
    assert of(told, "reward") == of(told, "scores") == [0.25, 1.0, 0.625]
    assert samples(told) == [STAND_IN, sample_of(scored(1.0)), STAND_IN]
    assert of(await actor.group(BROKE, 0.5, label=EVALUATION), "reward") == [0.5, 0.5]
    assert {split for split, _ in actor.job.told} == {"val"}
    assert sum(figures.tokens_trained for _, figures in actor.job.told) == 6


async def test_a_prompt_that_failed_whole_gets_the_mean_of_its_evaluation(bench: Callable[..., Bench]) -> None:
    actor = bench(*FILTERING)
    await actor.group(3.0)
    none, *_ = await asyncio.gather(*(actor.group(one, label=EVALUATION) for one in (BROKE, 0.1, 0.2)))
    assert of(none, "reward") == of(none, "scores") == pytest.approx([0.15]), "no training reward in it"


async def test_an_evaluation_without_a_score_takes_what_training_had(bench: Callable[..., Bench]) -> None:
    """OpenRLHF evaluates some prompts at a time, and one that fails may be the only one."""
    actor = bench(*GRPO)
    await actor.group(1.0)
    assert of(await actor.group(BROKE, BROKE, label=EVALUATION), "reward") == [1.0, 1.0]
    await actor.group(0.25, label=EVALUATION)
    assert of(await actor.group(BROKE, label=EVALUATION), "reward") == [0.25], "of the same evaluation"


async def test_an_evaluation_before_anything_was_scored_ends_the_run(bench: Callable[..., Bench]) -> None:
    actor = bench(*GRPO)
    with pytest.raises(RolloutError, match="No validation rollout could be scored"):
        await actor.group(BROKE, BROKE, label=EVALUATION)


# What is written.


async def test_each_rollout_is_written(bench: Callable[..., Bench]) -> None:
    actor = bench(*SMALL)
    for outcomes in ((1.0, 0.0, BROKE, 0.5), (1.0, 0.0, 1.0, 0.0), (BROKE, 0.5, BROKE, BROKE)):
        await actor.group(*outcomes)
    await actor.group(1.0, label=EVALUATION)
    lines = actor.lines
    assert [line["batch"] for line in lines] == [0] * 8 + [1] * 4 + [0]
    assert [line["split"] for line in lines] == ["train"] * 12 + ["val"]
    assert [line["reward"] for line in lines[:4]] == [1.0, 0.0, None, 0.5], "what was earned, not what was told"
    assert [line["tokens_trained"] for line in lines] == [3, 3, 0, 3, 3, 3, 3, 3, 0, 0, 0, 0, 3]
    assert lines[2]["tokens_dropped"] == {"failed": 2}
    assert lines[9]["tokens_dropped"] == {DropReason.ALONE_IN_GROUP: 3}
    assert {line["index"] for line in lines} == {7}
    assert len({line["group"] for line in lines}) == 4


# Prompts that run together, and labels.


async def test_prompts_that_run_together_are_kept_apart(bench: Callable[..., Bench]) -> None:
    """OpenRLHF makes the sampling parameters of each anew, and they may be equal."""
    actor = bench(*GRPO)
    one, other = await asyncio.gather(actor.group(1.0, 0.0, BROKE), actor.group(4.0, BROKE, 6.0))
    assert of(one, "scores") == [1.0, 0.0, 0.5]
    assert of(other, "scores") == [4.0, 5.0, 6.0]


async def test_samples_with_one_object_of_parameters_are_siblings(bench: Callable[..., Bench]) -> None:
    """They may be called for by anyone, as long as that object is there."""
    actor = bench(*GRPO)
    actor.worker.outcomes += [1.0, BROKE, 3.0, BROKE]
    params, others = SamplingParams(logprobs=1), SamplingParams(logprobs=1)
    calls = [
        actor.executor.execute(PROMPT, LABEL, one, MAX_LENGTH, actor.tokenizer, actor)
        for one in (params, params, others, others)
    ]
    assert of(await asyncio.wait_for(asyncio.gather(*calls), 10), "scores") == [1.0, 1.0, 3.0, 3.0]


@pytest.mark.parametrize("label", [json.dumps(ROW), ROW, {**ROW, "gymlink": None}, {**ROW, "gymlink": {}}])
async def test_a_label_is_a_row_as_text_or_not(bench: Callable[..., Bench], label: Any) -> None:
    """Without more it is to train on, and stands where it came."""
    actor = bench(*GRPO)
    await actor.group(1.0, label=label)
    await actor.group(1.0, label=label)
    assert [(request.row, request.index) for request, _ in actor.worker.asked] == [(ROW, 0), (ROW, 1)]
    assert {split for split, _ in actor.job.told} == {"train"}


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("42 is the answer", r"A label is not a Gym row in JSON \(.*'42 is the answer'.*`gymlink prompts openrlhf"),
        ("[1, 2]", "A label is not a Gym row in JSON"),
        ("42", "A label is not a Gym row in JSON"),
        (LABEL.replace('"agent"', '"stranger"'), "row 7: .*'stranger'"),
        ("{}", "row 0: .*responses_create_params"),
    ],
)
async def test_a_label_that_cannot_work_ends_the_run(bench: Callable[..., Bench], label: str, said: str) -> None:
    actor = bench(*GRPO)
    with pytest.raises(ConfigError, match=said):
        await actor.group(1.0, 1.0, label=label)
    assert actor.error.startswith("ConfigError: ")


async def test_images_end_the_run(bench: Callable[..., Bench]) -> None:
    actor = bench(*GRPO)
    with pytest.raises(ConfigError, match="A prompt came with images, and rollouts from Gym hold text only"):
        await actor.group(1.0, images=["a.png"])
    assert "came with images" in actor.error


# What ends the run otherwise.


async def test_a_defect_in_one_sibling_ends_the_run_and_keeps_none_waiting(bench: Callable[..., Bench]) -> None:
    actor = bench(*GRPO)
    with pytest.raises(RuntimeError, match="a defect"):
        await actor.group(1.0, RuntimeError("a defect"), 0.0)
    assert actor.error == "RolloutError: RuntimeError: a defect\n"
    await asyncio.sleep(0.01)
    assert len(actor.job.told) == 2


async def test_when_gym_does_not_start_the_run_ends(bench: Callable[..., Bench]) -> None:
    actor = bench(*GRPO, start=False)
    actor.job.host.error = GymStartError("no such environment")
    actor.start()
    with pytest.raises(GymStartError, match="no such environment"):
        await actor.group(1.0, 1.0)
    assert actor.error == "GymStartError: no such environment\n"


@pytest.mark.parametrize(
    ("flags", "gym_yaml", "said"),
    [
        (("--data.max_images_per_prompt", "1"), "", "max_images_per_prompt is 1"),
        ((), "alignment: {on_history_rewrite: fork}", "on_history_rewrite is 'fork'"),
    ],
)
async def test_a_setting_that_cannot_work_is_left_in_writing(
    bench: Callable[..., Bench], tmp_path: Path, flags: Sequence[str], gym_yaml: str, said: str
) -> None:
    """OpenRLHF only tells of an actor that died."""
    (tmp_path / "gym.yaml").write_text(f"gym: {{config_paths: [a.yaml]}}\n{gym_yaml}\n")
    actor = bench(*flags, start=False)
    with pytest.raises(ConfigError, match=said):
        actor.start()
    assert said in actor.error
