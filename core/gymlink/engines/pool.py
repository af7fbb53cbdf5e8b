"""`EnginePool`: several replicas of one policy as one engine, of which any may die at any time.

The calls of a rollout go to one replica, where their common prefix is cached. A replica that is down is taken out, and
what it was asked is asked of another, from the start: nothing half-sampled is kept. It comes back once it answers with
the weights that the others have.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gymlink.engines.base import ServedEngine
from gymlink.errors import ConfigError, EngineDownError, EngineError
from gymlink.types import Generation, Sampling

logger = logging.getLogger(__name__)

REMEMBERED = 65_536
"""Rollouts whose replica is remembered. One that is forgotten chooses anew, and pays with its cached prefix."""


@dataclass(eq=False)
class _Replica:
    engine: ServedEngine
    down: EngineError | None = None
    """Why it is out; None while it is in."""
    calls: set[asyncio.Future[Generation]] = field(default_factory=set)
    rollouts: int = 0
    """That were given to it first: what tells replicas apart when none is busy."""

    @property
    def load(self) -> tuple[int, int]:
        return len(self.calls), self.rollouts


class EnginePool:
    """An `Engine` made of `engines`, which serve the same policy.

    A server that was told to end may keep its connections open for ever (vLLM 0.29 does), and one that hangs says
    nothing: so each replica is asked every `probe_every_s` whether it is there, and its calls are taken from one that
    is not. Wrap a single replica too, for this.

    Raises:
        ConfigError: there is no engine.
    """

    def __init__(self, engines: Sequence[ServedEngine], *, probe_every_s: float = 5.0) -> None:
        if not engines:
            raise ConfigError("A pool of engines needs at least one.")
        self._replicas = [_Replica(engine) for engine in engines]
        self._probe_every_s = probe_every_s
        self._homes: OrderedDict[str, _Replica] = OrderedDict()
        self._version = 0
        self._loaded: tuple[str, int] | None = None
        self._updating = asyncio.Lock()
        self._watches: list[asyncio.Task[None]] = []
        self._closed = False
        self.taken_out = 0
        """How often a replica was found to be down."""
        self.retried = 0
        """How many calls were asked again of another replica."""

    @property
    def max_context(self) -> int | None:
        """The smallest of the replicas' limits."""
        limits = [replica.engine.max_context for replica in self._replicas]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def weight_version(self) -> int:
        versions = [replica.engine.weight_version for replica in self._replicas if replica.down is None]
        return max(versions, default=self._version)

    @property
    def down(self) -> dict[str, str]:
        """The replicas that are out, by name, and why."""
        return {str(replica.engine): str(replica.down) for replica in self._replicas if replica.down is not None}

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, stop_token_ids: Sequence[int], rollout_id: str
    ) -> Generation:
        self._start_watch()
        failed: dict[_Replica, EngineError] = {}
        while True:
            if self._closed:
                raise EngineError("The pool of engines is closed.")
            replica = self._choose(rollout_id, failed)
            self.retried += bool(failed)
            call = asyncio.ensure_future(
                replica.engine.generate(prompt_ids, sampling, stop_token_ids=stop_token_ids, rollout_id=rollout_id)
            )
            replica.calls.add(call)
            try:
                said = await call
                others = [one for one in self._there() if one is not replica and one not in failed]
                if said.finish_reason != "abort" or not others:
                    return said
                # Servers abort what they have begun when they are told to end (vLLM 0.29), just before they are gone.
                failed[replica] = EngineError(f"{replica.engine} aborted the generation.")
            except EngineDownError as error:
                self._take_out(replica, error)
                failed[replica] = error
            except asyncio.CancelledError:
                if replica.down is None or _cancelled_from_outside():
                    raise
                failed[replica] = replica.down
            finally:
                replica.calls.discard(call)

    async def probe(self) -> int:
        """Ask every replica; those that are away are taken out.

        Returns:
            The weight version of those that are in.

        Raises:
            EngineDownError: none answers.
            EngineError: one answers, and cannot be used as it is.
        """
        self._start_watch()
        there = self._there()
        results = await asyncio.gather(*(replica.engine.probe() for replica in there), return_exceptions=True)
        self._sort_out(there, results, EngineDownError)
        if not self._there():
            raise self._none_left({})
        return self.weight_version

    async def load_weights(self, path: str, version: int) -> None:
        """Load the same weights into every replica at once; one that is down gets them before it comes back.

        It goes on when the caller gives up: replicas must not be left with different weights.
        """
        self._start_watch()
        await asyncio.shield(self._load(path, version))

    async def _load(self, path: str, version: int) -> None:
        async with self._updating:  # none may come back with the old ones meanwhile
            there = self._there()
            results = await asyncio.gather(
                *(replica.engine.load_weights(path, version) for replica in there), return_exceptions=True
            )
            errors = self._sort_out(there, results, EngineError)
            if len(errors) == len(there):
                raise errors[0] if errors else self._none_left({})
            self._loaded, self._version = (path, version), version

    def set_weight_version(self, version: int) -> None:
        """Count the weights that the trainer has put into the replicas that are in as `version`.

        One that is out comes back when it tells that version itself (`/update_weight_version` of vLLM and of SGLang),
        and not before.
        """
        self._loaded, self._version = None, version
        for replica in self._there():
            replica.engine.set_weight_version(version)

    async def aclose(self) -> None:
        """Close every engine, and stop asking for them."""
        self._closed = True
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        await asyncio.gather(*(replica.engine.aclose() for replica in self._replicas))

    # --- Who is asked -----------------------------------------------------------------------------------------------

    def _there(self) -> list[_Replica]:
        return [replica for replica in self._replicas if replica.down is None]

    def _choose(self, rollout_id: str, failed: Mapping[_Replica, EngineError]) -> _Replica:
        home = self._homes.get(rollout_id)
        if home is None or home.down is not None or home in failed:
            there = [replica for replica in self._there() if replica not in failed]
            if not there:
                raise self._none_left(failed)
            home = min(there, key=lambda replica: replica.load)
            home.rollouts += 1
            self._homes[rollout_id] = home
            if len(self._homes) > REMEMBERED:
                self._homes.popitem(last=False)
        self._homes.move_to_end(rollout_id)
        return home

    def _none_left(self, failed: Mapping[_Replica, EngineError]) -> EngineDownError:
        reasons = [(replica.engine, replica.down or failed.get(replica)) for replica in self._replicas]
        if len(reasons) == 1:
            return EngineDownError(str(reasons[0][1]))
        listed = "".join(f"\n  {engine}: {reason}" for engine, reason in reasons)
        return EngineDownError(f"None of the {len(reasons)} engines could be asked:{listed}")

    # --- Who is there -----------------------------------------------------------------------------------------------

    def _take_out(self, replica: _Replica, error: EngineError) -> None:
        if replica.down is None:
            self._version = self.weight_version
            self.taken_out += 1
            logger.warning("%s is taken out: %s", replica.engine, error)
        replica.down = error

    def _sort_out(
        self, asked: Sequence[_Replica], results: Sequence[object], kind: type[EngineError]
    ) -> list[EngineError]:
        """Take out those that ended with an error of this kind, and give these; raise any other error."""
        errors = []
        for replica, result in zip(asked, results, strict=True):
            if isinstance(result, kind):
                self._take_out(replica, result)
                errors.append(result)
            elif isinstance(result, BaseException):
                raise result
        return errors

    def _start_watch(self) -> None:
        if not self._watches and not self._closed:
            self._watches = [asyncio.create_task(self._watch(replica)) for replica in self._replicas]

    async def _watch(self, replica: _Replica) -> None:
        while True:
            await asyncio.sleep(self._probe_every_s)
            try:
                if replica.down is None:
                    await replica.engine.ping()
                else:
                    await self._take_back(replica)
            except EngineError as error:
                self._take_out(replica, error)
                for call in list(replica.calls):  # where one call has failed by itself, the others are left to end
                    call.cancel()

    async def _take_back(self, replica: _Replica) -> None:
        async with self._updating:
            told, wanted = await replica.engine.probe(), self.weight_version
            if told == wanted:
                replica.engine.set_weight_version(wanted)
            elif self._loaded is not None and self._loaded[1] == wanted:
                await replica.engine.load_weights(*self._loaded)
            else:
                raise EngineDownError(
                    f"{replica.engine} answers again with weights of version {told}, and the version now is {wanted}: "
                    "put those weights into it, and tell it their version."
                )
        replica.down = None
        logger.info("%s is back, with the weights of version %d", replica.engine, wanted)


def _cancelled_from_outside() -> bool:
    """Whether this call itself is cancelled, and not only what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
