"""One Gym for a Ray job: an actor that starts it, and the handle by which the job's other processes reach it.

Whoever needs it first makes it, on its own node. The actor lives and ends with the job; Gym ends with the actor,
however that ends. What the job's rollouts came to is told here, and asked for here when a step is judged.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from gymlink.config import GatewaySettings, Settings, load_settings
from gymlink.errors import ConfigError, GymlinkError, GymStartError, RolloutError
from gymlink.host import GymHost, HostedGym
from gymlink.launch import ERROR_FILE, SAYS, note_error
from gymlink.report import Reporter
from gymlink.rollout import Figures, NeutralRewards, Recorder

ACTOR = "gymlink"
"""The actor's name, in the job's own Ray namespace."""
GYM_FILE = "gym.json"
"""In the run's folder: version and agents of the Gym that served the run."""
TOLD = 100_000
"""So many rollouts are kept for whoever asks; not every trainer does."""


class JobActor:
    """The job's part that exists once. Its methods run on one event loop."""

    def __init__(self, settings: Settings, run_dir: str, front: GatewaySettings) -> None:
        self._settings = settings
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        (self._run_dir / ERROR_FILE).unlink(missing_ok=True)
        self._report = _reporter()
        self._host = GymHost(settings, self._run_dir, front=front, report=self._report)
        self._recorder = Recorder(self._run_dir / "rollouts.jsonl", detail=settings.rollout.record)
        self._starting: asyncio.Task[HostedGym] | None = None
        self._broken: GymlinkError | None = None
        self._agents: set[str] = set()
        self._ended: dict[str, deque[Figures]] = {split: deque(maxlen=TOLD) for split in ("train", "val")}
        self._neutral = NeutralRewards(settings.rollout.max_failed_fraction)
        self._begun = {"train": 0, "val": 0}

    async def settings(self) -> Settings:
        return self._settings

    async def recorder(self) -> Recorder:
        """Makes the lines that `ended` takes, in whichever process the rollout was collected."""
        return self._recorder

    async def expect(self, agents: Collection[str], batch: int | None = None) -> None:
        """The job's rows are for these agents, and a step is of `batch` rollouts. Gym starts now, if it has not."""
        self._agents |= set(agents)
        if batch is not None:
            self._neutral.batch = batch
        self._start()

    def _start(self) -> asyncio.Task[HostedGym]:
        if self._starting is None:
            self._starting = asyncio.create_task(self._bring_up())
        return self._starting

    async def _bring_up(self) -> HostedGym:
        gym = await self._host.start()
        told = {"gym_version": gym.gym_version, "agents": sorted(gym.agents)}
        (self._run_dir / GYM_FILE).write_text(json.dumps(told) + "\n", encoding="utf-8")
        self._report(f"Gym runs, with {', '.join(sorted(gym.agents))}")
        return gym

    async def hosted(self) -> HostedGym:
        """The Gym, once it runs.

        Raises:
            ConfigError: a setting cannot work, or a row is for an agent that does not run. GymStartError: Gym did not
                come up.
        """
        try:
            gym = await asyncio.shield(self._start())
            _check_agents(self._agents, gym.agents)
        except GymlinkError as error:
            note_error(self._run_dir, error)
            raise
        except Exception as error:
            note_error(self._run_dir, error)
            raise GymStartError(f"Gym could not be started: {type(error).__name__}: {error}") from error
        return gym

    async def enlist(self, url: str) -> int:
        return self._host.enlist(url)

    async def ended(self, split: str, figures: Figures, line: bytes) -> None:
        """A rollout has ended; `line` is what is recorded of it."""
        self._ended[split].append(figures)
        self._recorder.append(line)

    async def broken(self, error: GymlinkError) -> None:
        """Agent loops cannot run, for this reason: whoever asks next for what has ended gets it instead."""
        note_error(self._run_dir, error)
        self._broken = self._broken or error

    async def take(self, split: str) -> list[Figures]:
        """Those that ended since this was last asked.

        Raises:
            GymError: one of Gym's servers has died. GymlinkError: agent loops cannot run.
        """
        if self._broken is not None:
            raise self._broken
        self._host.check()
        taken = list(self._ended[split])
        self._ended[split].clear()
        return taken

    async def note(self, error: Exception) -> None:
        """Leave word of why the run is being stopped, for whoever started it (`gymlink.launch`)."""
        note_error(self._run_dir, error)

    # Some trainers take a reward for every rollout, the failed ones too.

    async def begun(self, split: str) -> int:
        """A rollout begins: how many of its split did before it."""
        self._neutral.begun(split)
        self._begun[split] += 1
        return self._begun[split] - 1

    async def scored(self, split: str, group: str, figures: Figures, agent: str) -> None:
        await self._neutral.ended(split, group, figures, agent)

    async def neutral_reward(self, split: str, group: str, siblings: int, agent: str) -> float:
        """See `NeutralRewards.reward`."""
        with self._noting():
            self._host.check()
            return await self._neutral.reward(split, group, siblings, agent)

    async def judge(self, split: str) -> None:
        """A rollout has failed: raises `GymlinkError` when too many of the latest did, or Gym has died."""
        with self._noting():
            self._host.check()
            self._neutral.judge(split)

    async def reward_elsewhere(self, split: str, agent: str) -> float:
        """See `NeutralRewards.elsewhere`; a validation ends the job only when nothing at all was ever scored."""
        with self._noting():
            self._host.check()
            return await self._neutral.elsewhere(split, agent, or_in_training=True)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except GymlinkError as error:
            note_error(self._run_dir, error)
            raise


class Job:
    """A handle to the actor, in any process of the job."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    @classmethod
    def of(cls, gym_config: str, run_dir: str) -> Job:
        """The job's actor, made when there is none yet, for this gym.yaml; its logs go to `run_dir`.

        Raises:
            ConfigError: gym.yaml cannot be read or cannot work.
        """
        global _job  # noqa: PLW0603 - the process that makes the actor must hold it: with the last handle it would end
        ray_job = _ray_job()
        if _job is None or _job[0] != ray_job:
            _job = ray_job, cls(_find() or _make(gym_config, run_dir))
        return _job[1]

    def expect(self, agents: Collection[str], batch: int | None = None) -> None:
        """The job's rows are for these agents ("" stands for those that name none), `batch` rollouts a step."""
        _ask(self.actor.expect.remote(set(agents), batch))

    def wait(self) -> HostedGym:
        """Wait until Gym runs. Raises as `JobActor.hosted`."""
        gym: HostedGym = _ask(self.actor.hosted.remote())
        return gym

    def take(self, split: str) -> Sequence[Figures]:
        taken: Sequence[Figures] = _ask(self.actor.take.remote(split))
        return taken

    def settings(self) -> Settings:
        settings: Settings = _ask(self.actor.settings.remote())
        return settings

    def note(self, error: GymlinkError) -> None:
        _ask(self.actor.note.remote(plain(error)))


_job: tuple[tuple[str, str], Job] | None = None
"""This process's handle, with the Ray job that it is for."""


def _ray_job() -> tuple[str, str]:
    """Node and job: a process may have one Ray job after the other, and every cluster counts its jobs from one."""
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_job_id()


def _ask(answer: Any) -> Any:
    """Wait for an answer of the actor's; its errors are raised as what they are, without Ray's own around them."""
    try:
        return ray.get(answer)
    except RayTaskError as error:
        raise plain(error) from error


def plain(error: Exception) -> GymlinkError:
    """The error, out of what Ray wraps around it, as one that can be sent from process to process."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, GymlinkError):
        return cause
    return RolloutError(f"{type(cause).__name__}: {cause}")


def _find() -> Any:
    try:
        return ray.get_actor(ACTOR)
    except ValueError:
        return None


def _make(gym_config: str, run_dir: str) -> Any:
    settings = load_settings(gym_config)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    placed = ray.remote(JobActor).options(
        name=ACTOR, get_if_exists=True, num_cpus=0, max_concurrency=1_000_000, scheduling_strategy=here
    )
    return placed.remote(settings, str(Path(run_dir).expanduser().absolute()), front_of(settings))


ANY_ADDRESS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared with what the settings say


def front_of(settings: Settings) -> GatewaySettings:
    """Where the front listens: as gym.yaml says, and by default at the address at which Ray knows this node.

    That is so on one node too: others may join after the job has begun.

    Raises:
        ConfigError: the job has several nodes, and the address that gym.yaml gives is the node's own.
    """
    gateway, here = settings.gateway, ray.util.get_node_ip_address()
    if "host" not in gateway.model_fields_set:
        return gateway.model_copy(update={"host": here})
    if gateway.advertise_host is not None:
        return gateway
    if gateway.host in ANY_ADDRESS:
        return gateway.model_copy(update={"advertise_host": here})
    if _is_loopback(gateway.host) and (nodes := sum(bool(node["Alive"]) for node in ray.nodes())) > 1:
        raise ConfigError(
            f"gateway.host is {gateway.host!r}, which only its own node can reach, and this job has {nodes} nodes. "
            "Leave it out: by default the gateways are at the addresses by which Ray knows the nodes."
        )
    return gateway


def worker_gateway_of(settings: Settings) -> GatewaySettings:
    """Where a worker's gateway listens, for the front: at a free port, and at the address at which Ray knows this node.

    gym.yaml says otherwise only by asking for loopback, or for every interface (where the known address is not one of
    the node's own).
    """
    here, host = ray.util.get_node_ip_address(), settings.gateway.host
    if "host" in settings.gateway.model_fields_set and _is_loopback(host):
        return GatewaySettings(host=host)
    return GatewaySettings(host=host if host in ANY_ADDRESS else here, advertise_host=here)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_agents(wanted: Collection[str], running: Collection[str]) -> None:
    if "" in wanted and len(running) != 1:
        raise ConfigError(
            f"There are rows without agent_ref, and {len(running)} agents run ({', '.join(sorted(running))}): name one "
            'in each row, as {"type": "responses_api_agents", "name": ...}.'
        )
    if missing := sorted(set(wanted) - {"", *running}):
        raise ConfigError(
            f"The rows are for the agent {missing[0]!r}, which does not run; running: {', '.join(sorted(running))}. "
            "Add its config to gym.config_paths, or mend the rows' agent_ref."
        )


def _reporter() -> Callable[[str], None]:
    """Ray shows what an actor prints to whoever started the job."""
    say = Reporter(Console(force_terminal=False))
    return lambda text: say(f"{SAYS}{text}")
