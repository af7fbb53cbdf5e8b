"""`GymAgentExecutor`: the rollouts of one of OpenRLHF's rollout actors, run by Gym agents.

OpenRLHF makes one executor in each rollout actor and runs the samples of a prompt there, at the same time. The executor
has one worker: a gateway over that actor's vLLM, in its event loop, which joins the job's Gym with the first rollout.
The samples of a prompt wait for each other, because what a failed one is given depends on the others.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import orjson
from openrlhf.utils.agent import AgentExecutorBase

from gymlink.config import load_settings
from gymlink.engines import Engine
from gymlink.errors import ConfigError, EngineError, GymlinkError
from gymlink.gym import parse_row
from gymlink.host import HostedGym
from gymlink.launch import note_error
from gymlink.rollout import Figures, Group, Recorder, Siblings
from gymlink.rollout.recorder import Split
from gymlink.types import Rollout, RolloutRequest, Sampling
from gymlink.worker import RolloutWorker
from gymlink_openrlhf.convert import Sample, is_trainable, placeholder, response_of, sample_of, sampled_in
from gymlink_openrlhf.engine import ActorEngine
from gymlink_openrlhf.options import Options, command_line, one_branch, read_options, sampling_of
from gymlink_openrlhf.prompts import LABEL_FIELD
from gymlink_openrlhf.rewards import GroupRewards, equal, group_rewards
from gymlink_ray.job import Job, plain, worker_gateway_of


def executor_for(*, gym_config: str, run_dir: str) -> type[AgentExecutorBase]:
    """The `AgentExecutor` for the file that `--train.agent_func_path` names.

    Args:
        gym_config: path of gym.yaml.
        run_dir: `rollouts.jsonl` and the logs of Gym's servers go here.
    """
    return type("AgentExecutor", (GymAgentExecutor,), {"gym_config": gym_config, "run_dir": run_dir})


class GymAgentExecutor(AgentExecutorBase):  # type: ignore[misc]
    """See the module. Made by OpenRLHF, in a rollout actor, before its vLLM: Gym starts while vLLM does.

    Raises:
        ConfigError: gym.yaml or one of OpenRLHF's flags cannot work.
    """

    gym_config: ClassVar[str]
    run_dir: ClassVar[str]

    def __init__(self) -> None:
        self._siblings = Siblings()
        self._station: asyncio.Future[Station] | None = None
        self._unnumbered = 0
        try:
            self._options = read_options(command_line())
            one_branch(load_settings(self.gym_config))
            self._job = Job.of(self.gym_config, self.run_dir)
        except GymlinkError as error:
            Path(self.run_dir).mkdir(parents=True, exist_ok=True)
            note_error(Path(self.run_dir), error)
            raise
        self._job.actor.expect.remote(set(), self._options.batch)

    async def execute(  # noqa: PLR0917 - OpenRLHF's own signature
        self,
        prompt: str,
        label: str | Mapping[str, Any],
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:
        """Run the label's row in Gym. See `gymlink_openrlhf.convert.response_of` for what is returned.

        Raises:
            RolloutError: too many rollouts failed. GymlinkError: Gym did not start or has died, or a row or a setting
                cannot work. Either ends the run.
        """
        # OpenRLHF passes one object to all samples of a prompt, and to no other (`RolloutRayActor.generate_responses`).
        key = f"{id(sampling_params):x}"
        group, rollout = self._siblings.join(key), None
        try:
            try:
                if images:
                    raise ConfigError("A prompt came with images, and rollouts from Gym hold text only.")
                task = self._task(label)
                number = await self._job.actor.begun.remote(task.split)
                station = await self._at_station(hf_tokenizer, llm_engine, max_length)
                rollout = await station.collect(task, number, group.name, sampling_params)
            finally:
                self._siblings.leave(key, rollout)
            await group.complete.wait()
            if group.settled is None:
                group.settled = asyncio.ensure_future(station.settle(group, task, prompt, sampling_params))
            settled: Settled = await asyncio.shield(group.settled)
            await station.tell(task, rollout, settled)
            return response_of(
                rollout,
                settled.sample(rollout),
                prompt=prompt,
                label=label,
                reward=settled.rewards[rollout.rollout_id],
                score=settled.scores[rollout.rollout_id],
                with_logprobs=sampling_params.logprobs is not None,
            )
        except Exception as error:
            await self._job.actor.note.remote(plain(error))
            raise

    def _task(self, label: str | Mapping[str, Any]) -> Task:
        task = Task.of(label, self._unnumbered)
        self._unnumbered += 1
        return task

    async def _at_station(self, tokenizer: Any, llm_engine: Any, max_length: int) -> Station:
        if self._station is None:
            made = Station.set_up(self._job, self._options, tokenizer, ActorEngine(llm_engine, max_length))
            self._station = asyncio.ensure_future(made)
        return await asyncio.shield(self._station)


@dataclass(frozen=True, slots=True)
class Task:
    """A label: the Gym row as JSON, where it stands in its file, and what it is for ("train" or "val")."""

    row: bytes
    index: int
    split: Split

    @classmethod
    def of(cls, label: str | Mapping[str, Any], index: int) -> Task:
        """Raises `ConfigError` when a label is no Gym row; `index` is for those that do not say theirs."""
        try:
            row = dict(orjson.loads(label) if isinstance(label, str) else label)
        except (orjson.JSONDecodeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"A label is not a Gym row in JSON ({error}): {str(label)[:80]!r}. Make the prompt file with "
                "`gymlink prompts openrlhf ROWS`, and give --data.label_key label."
            ) from error
        own = row.pop(LABEL_FIELD, None) or {}
        return cls(orjson.dumps(row), int(own.get("index", index)), "val" if own.get("split") == "val" else "train")


@dataclass(frozen=True, slots=True)
class Settled:
    """What a group is worth. `rewards` and `scores` are by rollout id; `placeholder` stands for those that are not
    trained.

    `untrained` is the reason why nothing of the group is learnt, None when it is.
    """

    rewards: Mapping[str, float]
    scores: Mapping[str, float]
    placeholder: Sample | None
    untrained: str | None

    def sample(self, rollout: Rollout) -> Sample:
        """What OpenRLHF gets of one of the group's rollouts."""
        if self.placeholder is None or (is_trainable(rollout) and self.untrained is None):
            return sample_of(rollout)
        return self.placeholder

    def figures(self, rollout: Rollout) -> Figures:
        """What of it is trained, now that the group is known."""
        figures = Figures.of(rollout)
        if self.untrained is None or not figures.tokens_trained:
            return figures
        dropped = dict(figures.dropped) | {self.untrained: figures.tokens_trained}
        return replace(figures, tokens_trained=0, dropped=dropped)


@dataclass(frozen=True, slots=True)
class Station:
    """One rollout actor's worker, in the job's Gym, with these `agents`."""

    job: Job
    options: Options
    tokenizer: Any
    engine: Engine
    worker: RolloutWorker
    recorder: Recorder
    agents: Sequence[str]
    batches: dict[str, int] = field(default_factory=dict)
    """Of each rollout that goes on, the batch that it belongs to."""

    @classmethod
    async def set_up(cls, job: Job, options: Options, tokenizer: Any, engine: Engine) -> Station:
        """Join the job's Gym, with a gateway over this actor's vLLM. Raises as `JobActor.hosted` does."""
        settings = one_branch(await job.actor.settings.remote())
        gym: HostedGym = await job.actor.hosted.remote()
        worker = RolloutWorker(settings, tokenizer=tokenizer, engine=engine, sampling=Sampling())
        url = await worker.serve(gym.secret, worker_gateway_of(settings))
        worker.join(gym, owner=await job.actor.enlist.remote(url), secret=gym.secret)
        return cls(job, options, tokenizer, engine, worker, await job.actor.recorder.remote(), tuple(gym.agents))

    async def collect(self, task: Task, number: int, group: str, sampling_params: Any) -> Rollout:
        """One rollout, the one of this number in its split; the job is told how it ended."""
        row = parse_row(task.row, f"row {task.index}", self.agents)
        rollout = await self.worker.rollout(
            RolloutRequest(row, task.index, group=group), sampling=sampling_of(sampling_params)
        )
        self.batches[rollout.rollout_id] = number // self.options.batch
        await self.job.actor.scored.remote(task.split, group, Figures.of(rollout), _agent_of(rollout))
        return rollout

    async def settle(self, group: Group, task: Task, prompt: str, sampling_params: Any) -> Settled:
        """Judge a group, all of whose rollouts have ended.

        Raises:
            RolloutError: too many rollouts failed. GymError: one of Gym's servers has died.
        """
        scored = [rollout for rollout in group.ended if _counts(rollout, task)]
        others = [rollout for rollout in group.ended if not _counts(rollout, task)]
        if others and scored:
            await self.job.actor.judge.remote(task.split)
        rewards = await self._rewards(scored, others, task)
        stand_in = None
        if not all(map(is_trainable, group.ended)):
            stand_in = sampled_in([*others, *scored]) or await self._sampled(prompt, sampling_params)
        ids = [rollout.rollout_id for rollout in [*scored, *others]]
        return Settled(
            dict(zip(ids, [*rewards.rewards, *rewards.others], strict=True)),
            dict(zip(ids, [*rewards.scores, *[rewards.other_score] * len(others)], strict=True)),
            stand_in,
            rewards.untrained,
        )

    async def _rewards(self, scored: list[Rollout], others: list[Rollout], task: Task) -> GroupRewards:
        training = task.split == "train"
        if scored:
            return group_rewards(scored, len(others), self.options, training=training)
        reward = await self.job.actor.reward_elsewhere.remote(task.split, _agent_of(others[0]))
        if not training:
            return GroupRewards([], [], [reward] * len(others), reward)
        return GroupRewards([], [], [equal(reward)] * len(others), math.nan if self.options.filtering else reward)

    async def _sampled(self, prompt: str, sampling_params: Any) -> Sample:
        """A placeholder for a group in which nothing was sampled: so one token is, after the dataset's prompt."""
        ids = self.tokenizer(text=str(prompt), add_special_tokens=False)["input_ids"]
        room = (self.engine.max_context or len(ids) + 1) - 1
        prompt_ids = list(ids[-room:]) or [self.tokenizer.eos_token_id]
        sampling = replace(sampling_of(sampling_params), max_tokens=1)
        made = await self.engine.generate(prompt_ids, sampling, stop_token_ids=(), rollout_id="placeholder")
        if not made.token_ids:
            raise EngineError("vLLM sampled nothing, and OpenRLHF takes no sample without a token.")
        return placeholder(prompt_ids, made.token_ids[0], made.logprobs[0])

    async def tell(self, task: Task, rollout: Rollout, settled: Settled) -> None:
        """Tell the job what of a rollout is trained."""
        figures = settled.figures(rollout)
        batch = self.batches.pop(rollout.rollout_id)
        line = self.recorder.line(rollout, batch=batch, split=task.split, figures=figures)
        await self.job.actor.ended.remote(task.split, figures, line)


def _counts(rollout: Rollout, task: Task) -> bool:
    """Whether its reward does: in training only where there is a token to learn it by."""
    return is_trainable(rollout) or (task.split != "train" and rollout.reward is not None)


def _agent_of(rollout: Rollout) -> str:
    return str(rollout.request.row["agent_ref"]["name"])
