"""`GymAgentLoop`: one rollout of a verl job, run by a Gym agent.

Each process in which verl runs agent loops has one worker: a gateway over verl's rollout servers, which joins the job's
Gym with the first rollout. In the V1 trainer a failed rollout gives no row, so its siblings are trained without it; a
group in which too few were scored to compare fails as a whole, and verl replaces it where it can. The legacy trainer
takes a row for every rollout: a failed one's has nothing to train and a neutral reward.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput

from gymlink.errors import ConfigError, RolloutError
from gymlink.gym import parse_row
from gymlink.host import HostedGym
from gymlink.rollout import Figures, Group, Recorder, Siblings, describe_failures
from gymlink.types import DropReason, Rollout, RolloutRequest, Sampling
from gymlink.worker import RolloutWorker
from gymlink_ray.job import Job, plain, worker_gateway_of
from gymlink_verl.convert import masked_output, outputs_of
from gymlink_verl.engine import ServerEngine
from gymlink_verl.job import job_of
from gymlink_verl.options import Options, read_options, sampling_of

COMPARABLE = 2
"""Rollouts that a group-relative estimator needs of a group."""
NEEDED = ("gym_row", "gym_split", "index")
"""Fields of a sample that the agent loop reads, beside verl's own."""


class GroupFailedError(RolloutError):
    """Too few of a group were scored: verl goes on without it, or replaces it."""


class GymAgentLoop(AgentLoopBase):
    """verl makes one for every rollout; what they share is in `Station`."""

    async def run(self, sampling_params: dict[str, Any], **fields: Any) -> AgentLoopOutput | list[AgentLoopOutput]:
        """Run the sample's row in Gym.

        Raises:
            RolloutError: a whole group cannot be used; with the legacy trainer, too many rollouts failed.
            GymlinkError: Gym did not start, or a setting cannot work.
        """
        job = job_of(self.config.get("gymlink"))
        try:
            _check_fields(fields)
            if not self.config.trainer.use_v1:
                return await self._padded(job, sampling_params, fields)
            if fields["gym_split"] == "train":
                return await self._in_group(sampling_params, fields)
            station = await Station.of(self)
            return await _trained(station, await station.collect(sampling_params, fields), fields)
        except GroupFailedError:
            raise
        except Exception as error:
            # No failed rollout, but something that the next one would meet too: verl would go on without end.
            await job.actor.broken.remote(plain(error))
            raise

    async def _padded(self, job: Job, sampling_params: dict[str, Any], fields: dict[str, Any]) -> AgentLoopOutput:
        """The one row that the legacy trainer takes for every rollout."""
        split, group, actor = str(fields["gym_split"]), str(fields["uid"]), job.actor
        await actor.begun.remote(split)
        station = await Station.of(self)
        rollout = await station.collect(sampling_params, fields)
        outputs, figures = _rows(station, rollout)
        await station.tell(fields, rollout, figures)
        agent = str(rollout.request.row["agent_ref"]["name"])
        await actor.scored.remote(split, group, figures, agent)
        if outputs:
            return outputs[-1]
        reward = await actor.neutral_reward.remote(split, group, station.options.siblings[split], agent)
        return masked_output(rollout, station.options.shape, reward)

    async def _in_group(self, sampling_params: dict[str, Any], fields: dict[str, Any]) -> list[AgentLoopOutput]:
        uid, rollout = str(fields["uid"]), None
        group = SIBLINGS.join(uid)
        try:
            station = await Station.of(self)
            rollout = await station.collect(sampling_params, fields)
        finally:
            SIBLINGS.leave(uid, rollout)
        await group.complete.wait()
        needed = COMPARABLE if station.options.group_relative and group.members > 1 else 1
        if len(group.scored) >= needed:
            return await _trained(station, rollout, fields)
        await station.tell(fields, rollout, _untrained(rollout))
        if rollout is group.ended[-1]:
            # One of them says so, and verl takes the group as failed: its asynchronous trainers replace it.
            raise GroupFailedError(_why_unusable(group))
        return []


def _check_fields(fields: Mapping[str, Any]) -> None:
    if missing := [name for name in NEEDED if name not in fields]:
        raise ConfigError(
            f"A sample without the field {missing[0]!r} came to gymlink's agent loop (it has {', '.join(fields)}): "
            "take the rows with data.custom_cls, as +gymlink=gym does."
        )


async def _trained(station: Station, rollout: Rollout, fields: dict[str, Any]) -> list[AgentLoopOutput]:
    """The rows of a rollout, none when it failed; its figures are told to the job."""
    outputs, figures = _rows(station, rollout)
    await station.tell(fields, rollout, figures)
    return outputs


def _rows(station: Station, rollout: Rollout) -> tuple[list[AgentLoopOutput], Figures]:
    if not rollout.segments:
        return [], Figures.of(rollout)
    return outputs_of(rollout, station.options.shape)


def _untrained(rollout: Rollout) -> Figures:
    figures = Figures.of(rollout)
    dropped = dict(figures.dropped) | (
        {DropReason.ALONE_IN_GROUP: figures.tokens_trained} if figures.tokens_trained else {}
    )
    return replace(figures, tokens_trained=0, dropped=dropped)


def _why_unusable(group: Group) -> str:
    told = describe_failures([Figures.of(rollout) for rollout in group.ended])
    return f"{told} A group with {len(group.scored)} scored rollouts trains nothing."


class Station:
    """One process's worker, in the job's Gym."""

    def __init__(self, worker: RolloutWorker, gym: HostedGym, job: Job, options: Options, recorder: Recorder) -> None:
        self.options = options
        self.job = job
        self._worker = worker
        self._agents = tuple(gym.agents)
        self._recorder = recorder

    @classmethod
    async def of(cls, loop: AgentLoopBase) -> Station:
        """This process's station, set up with the first rollout. Raises as `JobActor.hosted` does."""
        global _station  # noqa: PLW0603 - one for each process, like the event loop that it lives on
        if _station is None:
            _station = asyncio.ensure_future(cls._set_up(loop))
        return await asyncio.shield(_station)

    @classmethod
    async def _set_up(cls, loop: AgentLoopBase) -> Station:
        options = read_options(loop.config, loop.tokenizer.eos_token_id)
        job = job_of(loop.config.get("gymlink"))
        settings = options.apply(await job.actor.settings.remote())
        gym: HostedGym = await job.actor.hosted.remote()
        worker = RolloutWorker(
            settings,
            tokenizer=loop.tokenizer,
            engine=ServerEngine(loop.server_manager, options.max_context),
            sampling=Sampling(max_tokens=options.max_turn_tokens),
        )
        url = await worker.serve(gym.secret, worker_gateway_of(settings))
        worker.join(gym, owner=await job.actor.enlist.remote(url), secret=gym.secret)
        return cls(worker, gym, job, options, await job.actor.recorder.remote())

    async def collect(self, sampling_params: dict[str, Any], fields: dict[str, Any]) -> Rollout:
        index = int(fields["index"])
        row = parse_row(fields["gym_row"].encode(), f"row {index}", self._agents)
        return await self._worker.rollout(
            RolloutRequest(row, index, group=str(fields["uid"])),
            sampling=sampling_of(sampling_params, self.options.max_turn_tokens),
        )

    async def tell(self, fields: dict[str, Any], rollout: Rollout, figures: Figures) -> None:
        """Tell the job what became of a rollout, and what of it is trained."""
        split = fields["gym_split"]
        line = self._recorder.line(rollout, batch=int(fields.get("global_steps", 0)), split=split, figures=figures)
        await self.job.actor.ended.remote(split, figures, line)


SIBLINGS = Siblings()
_station: asyncio.Future[Station] | None = None
