"""One training process and its Gym: gateway, Gym's servers and collector, started in order and stopped in reverse.

Everything asynchronous runs on one event loop in one thread of the session's own, so a trainer calls `collect` as a
plain function. With several trainer processes the first starts Gym and is the address that Gym knows; its gateway
passes each call on to the process that owns the rollout.
"""

from __future__ import annotations

import asyncio
import atexit
import secrets
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.routing import Route

from gymlink.config import PolicySettings, Settings
from gymlink.engines import Engine
from gymlink.errors import GymError, GymStartError, RolloutError
from gymlink.gateway import POLICY, PolicyService, Router, Totals
from gymlink.gym import GymServers, attach_gym, capture_folder, start_gym
from gymlink.host import check_policy_url, find_attached, policy_key
from gymlink.rollout import OnRollout, Recorder
from gymlink.types import Rollout, RolloutBatch, RolloutRequest, Sampling
from gymlink.worker import RolloutWorker

T = TypeVar("T")
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Peers:
    """The processes of one training job.

    `exchange(value)` is an all-gather of small picklable values: every process calls it, and each gets the values
    of all, by rank.
    """

    rank: int = 0
    world_size: int = 1
    exchange: Callable[[Any], list[Any]] = lambda value: [value]


def _silent(_: str) -> None:
    """The default `report`: says nothing."""


class Session:
    """Collects rollouts for one training process. A context manager; `stop` may be called at any time, and twice.

    Args:
        settings: from `gymlink.config.load_settings`; with `PolicySettings` no Gym is started, and nothing collected.
        tokenizer: the policy's, with its chat template.
        engine: samples from the policy; closed with the session.
        sampling: the trainer's, for every call of the policy.
        run_dir: logs of Gym's servers and `rollouts.jsonl` go here; made when missing.
        report: told in a few words what is being waited for.
        peers: the other processes of the job, when there are some.
        model: the name under which the policy is listed.
        secret: what calls of the gateway must carry; made up when not given. An attached Gym has its own.
        routes: further routes of the gateway, for those who carry the secret.

    Raises (from `start`):
        ConfigError: settings that cannot work. GymStartError: Gym did not come up.
    """

    def __init__(
        self,
        settings: PolicySettings,
        *,
        tokenizer: Any,
        engine: Engine,
        sampling: Sampling,
        run_dir: Path,
        report: Report = _silent,
        peers: Peers | None = None,
        model: str = POLICY,
        secret: str | None = None,
        routes: Callable[[Session], Sequence[Route]] = lambda _: (),
    ) -> None:
        self._settings = settings
        self.secret = secret or secrets.token_urlsafe(24)
        """What calls of the gateway must carry, once the session has started."""
        self._routes = routes
        self.run_dir = run_dir
        self._report = report
        self._peers = peers or Peers()
        self._worker = RolloutWorker(settings, tokenizer=tokenizer, engine=engine, sampling=sampling, model=model)
        self._loop: _LoopThread | None = None
        self._url: str | None = None
        self._up = False
        self._gym: GymServers | None = None
        self._recorder: Recorder | None = None
        self._batches = 0
        self._ledger = _Ledger(self._worker.service.totals)

    @property
    def service(self) -> PolicyService:
        """The gateway's inside: its totals are the count of all that the engine sampled."""
        return self._worker.service

    @property
    def url(self) -> str:
        """Where this process's gateway answers, without `/v1`."""
        if self._url is None:
            raise _not_started()
        return self._url

    @property
    def ready(self) -> bool:
        """Whether all that it starts is up."""
        return self._up

    @property
    def agents(self) -> tuple[str, ...]:
        """The agents that run, by name."""
        return tuple(self._running_gym.agents)

    @property
    def gym_version(self) -> str | None:
        """The version of nemo-gym; None for a Gym that this process attached to."""
        return self._running_gym.version

    @property
    def _running_gym(self) -> GymServers:
        if self._gym is None:
            raise _not_started()
        return self._gym

    def start(self) -> None:
        """Bring up the gateway, then Gym. With several processes, all of them call this."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        rank = self._peers.rank
        settings = self._settings
        attached = find_attached(settings, self._report) if isinstance(settings, Settings) else None
        own_secret = policy_key(attached) if attached else self.secret
        secret = self.secret = str(self._peers.exchange(own_secret)[0])
        self._loop = _LoopThread()
        atexit.register(self.stop)
        router = Router(rank)
        serving = self._worker.serve(secret, self._gateway_settings(rank), router, routes=self._routes(self))
        self._url = self._loop.run(serving)
        urls = dict(enumerate(self._peers.exchange(self._url)))
        if rank == 0:
            router.peers |= {str(peer): url for peer, url in urls.items() if peer != rank}
        if not isinstance(settings, Settings):
            self._up = True
            return
        self._gym = self._join_gym(settings, attached, urls[0], secret)
        self._worker.join(self._gym, owner=rank, captures=capture_folder(self._gym.config))
        name = "rollouts.jsonl" if rank == 0 else f"rollouts.rank{rank}.jsonl"
        self._recorder = Recorder(self.run_dir / name, detail=self._settings.rollout.record)
        self._up = True

    def _gateway_settings(self, rank: int) -> Any:
        """Only the first process has the configured port: the others are not known to Gym."""
        settings = self._settings.gateway
        return settings if rank == 0 else settings.model_copy(update={"port": 0})

    def _join_gym(self, settings: Settings, attached: GymServers | None, gateway_url: str, secret: str) -> GymServers:
        """The first process starts Gym and tells the others where its head server is, or why there is none."""
        if attached is not None:
            check_policy_url(attached, gateway_url)
            return attached
        if self._peers.rank == 0:
            try:
                gym = start_gym(
                    settings.gym,
                    policy_base_url=f"{gateway_url}/v1",
                    policy_api_key=secret,
                    token_ids=self._settings.gateway.token_ids,
                    run_dir=self.run_dir,
                    report=self._report,
                )
            except BaseException as error:
                self._peers.exchange((None, str(error)))
                raise
            self._peers.exchange((gym.head_url, None))
            return gym
        head_url, failure = self._peers.exchange(None)[0]
        if head_url is None:
            raise GymStartError(f"The first process could not start Gym: {failure}")
        return attach_gym(head_url)

    def collect(
        self,
        requests: Sequence[RolloutRequest],
        *,
        sampling: Sampling | None = None,
        on_rollout: OnRollout | None = None,
    ) -> RolloutBatch:
        """Collect one rollout per request, and wait for all of them. Other collections may be under way.

        `sampling` replaces the session's for this batch. `on_rollout` is called from the session's thread.

        Raises:
            RolloutError: too many of the batch failed. GymError: a server of the Gym that was started here has died.
        """
        return self._running_loop.run(self._collecting(requests, sampling, on_rollout))

    def submit(
        self,
        requests: Sequence[RolloutRequest],
        *,
        sampling: Sampling | None = None,
        on_rollout: OnRollout | None = None,
    ) -> Future[RolloutBatch]:
        """Begin to collect, and do not wait: `collect`'s batch, or its error, is the future's.

        Any number of collections may be under way. Cancelling the future ends the rollouts of its batch.
        """
        return self._running_loop.submit(self._collecting(requests, sampling, on_rollout))

    async def _collecting(
        self, requests: Sequence[RolloutRequest], sampling: Sampling | None, on_rollout: OnRollout | None
    ) -> RolloutBatch:
        self._ledger.begin()
        batch = None
        try:
            batch = await self.collecting(requests, sampling=sampling, on_rollout=on_rollout)
        finally:
            self._ledger.end(batch)
        return batch

    async def collecting(
        self,
        requests: Sequence[RolloutRequest],
        *,
        sampling: Sampling | None = None,
        on_rollout: OnRollout | None = None,
    ) -> RolloutBatch:
        """`collect`, for those who are on the session's own event loop; what was sampled is not counted anew."""
        recorder = self._recorder
        if recorder is None:
            raise _not_started()
        if self._running_gym.owned:
            await asyncio.to_thread(self._running_gym.check)
        batch, self._batches = self._batches, self._batches + 1

        def ended(rollout: Rollout) -> None:
            recorder.write(rollout, batch=batch)
            if on_rollout is not None:
                on_rollout(rollout)

        return await self._worker.collect(requests, ended, sampling=sampling)

    def pause(self) -> None:
        """Let no generation begin until `resume`, from any thread: rollouts that run wait, and lose nothing.

        It is this process's engine that rests; with several processes, each pauses its own.
        """
        self._on_loop(self.service.pause)

    def drain(self, timeout_s: float) -> int:
        """Wait until no generation is in flight; how many still are when `timeout_s` has passed."""
        return self._running_loop.run(self.service.drain(timeout_s))

    def resume(self, weight_version: int | None = None) -> None:
        """Let generations begin again, with weights of this version. See `gymlink.gateway.PolicyService.resume`."""
        self._on_loop(partial(self.service.resume, weight_version))

    def _on_loop(self, call: Callable[[], None]) -> None:
        async def called() -> None:
            call()

        self._running_loop.run(called())

    @property
    def _running_loop(self) -> _LoopThread:
        if self._loop is None:
            raise _not_started()
        return self._loop

    def stop(self) -> None:
        """Stop all that this session started, Gym first."""
        self._up = False
        atexit.unregister(self.stop)
        if self._gym is not None:
            self._gym.stop()
        if self._loop is not None:
            try:
                self._loop.run(self._worker.close())
            finally:
                self._loop.stop()
                self._loop = None

    def __enter__(self) -> Session:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _not_started() -> GymError:
    return GymError("The session is not started: call start(), or use it as a context manager.")


class _Ledger:
    """Holds what the engine sampled against what the rollouts tell, over collections that may overlap.

    A batch must account for what its own rollouts sampled. What the engine counted where it came out is compared once
    no collection is under way, since only then it is known whose every token is.
    """

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        self._under_way = 0
        self._before = self._told = 0
        self._all_told = True

    def begin(self) -> None:
        """A collection begins."""
        if not self._under_way:
            self._before, self._told, self._all_told = self._totals.attributed_tokens, 0, True
        self._under_way += 1

    def end(self, batch: RolloutBatch | None) -> None:
        """A collection has ended, with a batch or without one.

        Raises:
            RolloutError: a sampled token is in no rollout, or neither trained nor counted as dropped.
        """
        self._under_way -= 1
        if batch is None:  # nobody tells what its rollouts sampled
            self._all_told = False
            return
        told = sum(rollout.sampled_tokens for rollout in batch.rollouts)
        accounted = sum(rollout.trained_tokens + sum(rollout.dropped.values()) for rollout in batch.rollouts)
        self._told += told
        sampled = self._totals.attributed_tokens - self._before
        comparable = not self._under_way and self._all_told
        if told != accounted or (comparable and sampled != self._told):
            raise RolloutError(
                f"The engine sampled {sampled} tokens; the rollouts tell of {self._told}. Of {told} in this batch "
                f"{accounted} are trained or counted as dropped. Please report this: it is a defect of gymlink."
            )


class _LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gymlink", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop and wait. An interrupt here cancels it."""
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `work` on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()
