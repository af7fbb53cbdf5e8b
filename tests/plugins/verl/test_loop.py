"""The agent loop as verl makes and runs it: what becomes of a failed rollout, and of a group with too few to compare.

Rollouts are told here and not collected; the agent loop, its groups, the rows and the job's bookkeeping are real.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import hydra
import pytest
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap
from verl.utils.dataset.rl_dataset import RLHFDataset

from gymlink.align import build_segments
from gymlink.config import GatewaySettings, GymSettings, Settings
from gymlink.errors import ConfigError, GymlinkError, RolloutError
from gymlink.host import GymHost, HostedGym
from gymlink.rollout import Figures, Recorder
from gymlink.types import DropReason, Rollout, RolloutRequest, RolloutStatus, Sampling, Turn
from gymlink_ray.job import Job, JobActor
from gymlink_verl import loop
from gymlink_verl.loop import GymAgentLoop, Station
from gymlink_verl.options import read_options

PARAMS = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
ROW = '{"responses_create_params": {"input": "go"}, "agent_ref": {"name": "agent"}}'
GYM = HostedGym("http://nowhere", "secret", {"agent": "http://nowhere/agent"}, "0.4.0")

Outcome = float | None | Exception
"""How a rollout goes: its reward, None when it fails, or what is raised instead."""


class Worker:
    """Stands where `gymlink.worker.RolloutWorker` stands; the outcomes come in the order of the calls."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.asked: list[tuple[RolloutRequest, Sampling]] = []

    async def rollout(self, request: RolloutRequest, *, sampling: Sampling) -> Rollout:
        outcome = self.outcomes[len(self.asked)]
        self.asked.append((request, sampling))
        await asyncio.sleep(0.001 * (len(self.outcomes) - len(self.asked)))  # the first to begin ends last
        if isinstance(outcome, Exception):
            raise outcome
        turns = (Turn((1, 2), (3, 4, 5), (-0.5, -0.5, -0.5), "stop"),)
        if outcome is None:
            return Rollout(
                request,
                "0.r",
                RolloutStatus.FAILED,
                None,
                turns=turns,
                failure="http",
                detail="the door is stuck",
                sampled_tokens=3,
                dropped={"failed": 3},
            )
        segments, dropped = build_segments(turns, on_history_rewrite="fork")
        return Rollout(
            request,
            "0.r",
            RolloutStatus.COMPLETED,
            outcome,
            segments=segments,
            turns=turns,
            sampled_tokens=3,
            dropped=dropped,
        )


class AlwaysWell(GymHost):
    """A Gym that is looked at and never called: the worker is a stand-in."""

    def check(self) -> None: ...


class Told(JobActor):
    """The job's actor, which also keeps what it is told."""

    def __init__(self, run_dir: Path) -> None:
        settings = Settings(gym=GymSettings(config_paths=["a.yaml"]))
        super().__init__(settings, str(run_dir), GatewaySettings())
        self._host = AlwaysWell(settings, run_dir)
        self.told: list[tuple[str, Figures]] = []

    async def ended(self, split: str, figures: Figures, line: bytes) -> None:
        await super().ended(split, figures, line)
        figures.check_conservation()
        self.told.append((split, figures))


class Remote:
    """An actor's handle, called here and not through Ray."""

    def __init__(self, actor: object) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._actor, name)
        return type("Method", (), {"remote": staticmethod(method)})


class Bench:
    """One process of a job: runs samples as verl's workers do."""

    def __init__(self, config: Any, tokenizer: PreTrainedTokenizerBase, run_dir: Path) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.worker, self.actor = Worker(), Told(run_dir)
        self.run_dir = run_dir
        options = read_options(config, cast("int", tokenizer.eos_token_id))
        job: Any = SimpleNamespace(actor=Remote(self.actor))
        recorder = Recorder(run_dir / "rollouts.jsonl")
        self.station = Station(cast("Any", self.worker), GYM, job, options, recorder)

    def loop(self) -> GymAgentLoop:
        """As `AgentLoopWorker._run_agent_loop` (verl 0.9.1) makes one for every rollout."""
        [entry] = OmegaConf.load(self.config.actor_rollout_ref.rollout.agent.agent_loop_config_path)
        made = hydra.utils.instantiate(
            config=entry,
            trainer_config=DictConfigWrap(config=self.config),
            server_manager=None,
            tokenizer=self.tokenizer,
            processor=None,
            hf_model_type="qwen2",
            dataset_cls=RLHFDataset,
            data_config=DictConfigWrap(self.config.data),
            tools=None,
        )
        assert isinstance(made, GymAgentLoop)
        return made

    async def group(self, *outcomes: Outcome, split: str = "train", uid: str = "u") -> list[Any]:
        """One prompt with a sibling for each outcome, as the V1 trainer runs it: what each gave, or raised."""
        self.worker.outcomes += outcomes
        calls = [self.loop().run(PARAMS, **fields(split, uid), session_id=at) for at in range(len(outcomes))]
        return await self.settled(calls)

    async def padded(self, *outcomes: Outcome, split: str = "train", uid: str = "u") -> list[Any]:
        """The same, as the legacy trainer does."""
        self.worker.outcomes += outcomes
        return await self.settled([self.loop().run(PARAMS, **fields(split, uid)) for _ in outcomes])

    async def settled(self, calls: list[Awaitable[Any]]) -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)


def fields(split: str, uid: str) -> dict[str, Any]:
    return {"gym_row": ROW, "gym_split": split, "uid": uid, "index": 7, "global_steps": 2, "data_source": "agent"}


@pytest.fixture
def bench(
    composed: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Bench]]:
    """Makes a process of a job with these overrides; that no group was left behind is checked in the end."""

    def make(*overrides: str) -> Bench:
        made = Bench(composed(*overrides), tokenizer, tmp_path)

        async def of(_: object) -> Station:
            return made.station

        monkeypatch.setattr(Station, "of", of)
        monkeypatch.setattr(Job, "of", lambda *_: made.station.job)
        monkeypatch.setattr("gymlink.rollout.neutral.GRACE_S", 0.02)
        return made

    yield make
    assert loop.SIBLINGS._groups == {}


GRPO = "algorithm.adv_estimator=grpo"
LEGACY = "trainer.use_v1=false"


def rewards(results: list[Any]) -> list[list[float | None]]:
    return [[output.reward_score for output in result] for result in results]


async def test_a_failed_rollout_gives_no_row_and_its_siblings_are_kept(bench: Callable[..., Bench]) -> None:
    process = bench(GRPO)
    results = await process.group(1.0, None, 0.0, None)
    assert rewards(results) == [[1.0], [], [0.0], []]
    assert sorted(str(figures.reward) for _, figures in process.actor.told) == ["0.0", "1.0", "None", "None"]
    assert sum(figures.tokens_trained for _, figures in process.actor.told) == 6
    request, sampling = process.worker.asked[0]
    assert (request.index, request.group) == (7, "u")
    assert sampling == Sampling(1.0, 1.0, 0, max_tokens=process.station.options.max_turn_tokens)
    assert len((process.run_dir / "rollouts.jsonl").read_bytes().splitlines()) == 4


async def test_a_scored_rollout_that_is_alone_is_dropped_and_its_tokens_counted(bench: Callable[..., Bench]) -> None:
    """Exactly one sibling says so: verl takes the group as failed, and one line in its log is enough."""
    process = bench(GRPO)
    results = await process.group(None, 1.0, None)
    assert [result for result in results if result != []] == [
        error for error in results if isinstance(error, RolloutError)
    ]
    [error] = [result for result in results if result != []]
    assert "2 of 3 rollouts failed (http: 2); the first: the door is stuck" in str(error)
    assert "A group with 1 scored rollouts trains nothing" in str(error)
    assert sum(figures.tokens_trained for _, figures in process.actor.told) == 0
    dropped = [dict(figures.dropped) for _, figures in process.actor.told]
    assert sorted(dropped, key=str) == [{DropReason.ALONE_IN_GROUP: 3}, {"failed": 3}, {"failed": 3}]


async def test_a_group_that_failed_says_so_once(bench: Callable[..., Bench]) -> None:
    for overrides in ([GRPO], []):
        results = await bench(*overrides).group(None, None, None, uid=str(overrides))
        assert len([result for result in results if isinstance(result, RolloutError)]) == 1
        assert results.count([]) == 2


@pytest.mark.parametrize(
    ("estimator", "outcomes"),
    [("gae", [1.0]), ("gae", [1.0, None]), ("reinforce_plus_plus", [1.0, None, None]), ("grpo", [1.0])],
)
async def test_one_scored_rollout_is_enough_where_nothing_is_compared(
    bench: Callable[..., Bench], estimator: str, outcomes: list[Outcome]
) -> None:
    """Under grpo too, when the user asks for one rollout of a prompt."""
    results = await bench(f"algorithm.adv_estimator={estimator}").group(*outcomes)
    assert rewards(results) == [[1.0], *[[] for _ in outcomes[1:]]]


async def test_a_failed_validation_rollout_is_left_out(bench: Callable[..., Bench]) -> None:
    process = bench(GRPO)
    assert await process.group(None, split="val") == [[]]
    assert rewards(await process.group(None, 0.5, split="val")) == [[], [0.5]]
    assert {split for split, _ in process.actor.told} == {"val"}


async def test_an_error_in_one_sibling_keeps_no_other_waiting(bench: Callable[..., Bench]) -> None:
    process = bench(GRPO)
    broken = RuntimeError("a defect")
    one, two, three = await process.group(1.0, broken, 0.0)
    assert two is broken
    assert rewards([one, three]) == [[1.0], [0.0]]

    results = await process.group(broken, 1.0, uid="v")
    assert results[0] is broken
    assert isinstance(results[1], RolloutError), "alone, it trains nothing"


async def test_groups_that_run_together_are_kept_apart(bench: Callable[..., Bench]) -> None:
    process = bench(GRPO)
    good, bad = await asyncio.gather(process.group(1.0, 0.0, uid="a"), process.group(None, None, uid="b"))
    assert rewards(good) == [[1.0], [0.0]]
    assert bad.count([]) == 1


async def test_when_gym_does_not_start_every_sibling_says_why(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = bench(GRPO)

    async def of(_: object) -> Station:
        raise ConfigError("no such environment")

    monkeypatch.setattr(Station, "of", of)
    results = await process.group(1.0, 1.0, 1.0)
    assert [str(result) for result in results] == ["no such environment"] * 3


async def test_a_sample_without_a_row_says_what_to_do(bench: Callable[..., Bench]) -> None:
    with pytest.raises(ConfigError, match=r"'gym_row'.*it has raw_prompt, uid.*data.custom_cls.*\+gymlink=gym"):
        await bench().loop().run(PARAMS, raw_prompt=[], uid="u")


async def test_a_row_for_an_agent_that_does_not_run_names_it(bench: Callable[..., Bench]) -> None:
    sample = {**fields("val", "u"), "gym_row": ROW.replace('"agent"', '"stranger"')}
    with pytest.raises(ConfigError, match=r"row 7: .*stranger"):
        await bench().loop().run(PARAMS, **sample, session_id=0)


async def test_the_legacy_trainer_gets_one_row_for_each(bench: Callable[..., Bench]) -> None:
    process = bench(GRPO, LEGACY, "actor_rollout_ref.rollout.n=4")
    results = await process.padded(1.0, None, 0.0, None)
    assert all(isinstance(result, AgentLoopOutput) for result in results)
    assert [sum(result.response_mask) for result in results] == [3, 0, 3, 0]
    given = [result.reward_score for result in results]
    assert given[::2] == [1.0, 0.0]
    assert sum(given) / 4 == pytest.approx(0.5), "the group's mean is that of the scored"
    assert [result.extra_fields["reward_extra_info"]["gym_failed"] for result in results] == [0, 1, 0, 1]
    assert {key for result in results for key in result.extra_fields} == set(results[1].extra_fields)


async def test_the_legacy_trainer_stops_when_nothing_was_scored(bench: Callable[..., Bench]) -> None:
    process = bench(LEGACY, "actor_rollout_ref.rollout.val_kwargs.n=2")
    results = await process.padded(None, None, split="val")
    assert all(isinstance(result, RolloutError) for result in results)
    assert "No validation rollout could be scored. 2 of 2" in str(results[0])
    assert (process.run_dir / "error.txt").read_text().startswith("RolloutError: No validation rollout")


async def test_a_process_is_set_up_once_also_when_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts begin all at a time; each waits for the one station, and each is told why there is none."""
    made: list[str] = []

    async def set_up(_: object) -> Station:
        made.append("once")
        await asyncio.sleep(0)
        raise GymlinkError("no Gym")

    monkeypatch.setattr(Station, "_set_up", set_up)
    monkeypatch.setattr(loop, "_station", None)
    results = await asyncio.gather(*(Station.of(cast("Any", None)) for _ in range(3)), return_exceptions=True)
    assert [str(result) for result in results] == ["no Gym"] * 3
    assert made == ["once"]


async def test_what_is_no_failed_rollout_ends_the_run(bench: Callable[..., Bench]) -> None:
    """verl would replace such a group for ever, or go on without it."""
    process = bench(GRPO)
    broken = ConfigError("the disk is full")

    async def tell(*_: object) -> None:
        raise broken

    process.station.tell = tell  # type: ignore[method-assign]
    results = await process.group(1.0, 2.0)
    assert results == [broken, broken]
    with pytest.raises(ConfigError, match="the disk is full"):
        await process.actor.take("train")
    assert "ConfigError: the disk is full" in (process.run_dir / "error.txt").read_text()


async def test_a_group_that_failed_does_not_end_the_run(bench: Callable[..., Bench]) -> None:
    process = bench(GRPO)
    results = await process.group(None, None)
    assert [type(result).__name__ for result in results if result != []] == ["GroupFailedError"]
    assert len(await process.actor.take("train")) == 2


@pytest.mark.parametrize("field", ["gym_row", "gym_split", "index"])
async def test_a_sample_without_a_field_is_told(bench: Callable[..., Bench], field: str) -> None:
    sample = {name: value for name, value in fields("train", "u").items() if name != field}
    with pytest.raises(ConfigError, match=rf"without the field '{field}' .* data\.custom_cls"):
        await bench(GRPO).loop().run(PARAMS, **sample, session_id=0)
