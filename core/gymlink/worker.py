"""One process's part in collecting: a gateway over its engine and a collector, on the event loop of the caller.

`serve` brings up the gateway, `join` connects it to a Gym that runs; from then on rollouts can be collected, any
number at a time. `close` ends it all, at any moment, and twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.routing import Route

from gymlink.align import load_format
from gymlink.config import GatewaySettings, PolicySettings
from gymlink.engines import Engine
from gymlink.errors import GymError
from gymlink.gateway import POLICY, GatewayServer, PolicyService, Router, create_app
from gymlink.gym import Addresses, GymClient
from gymlink.rollout import Claims, Collector, OnRollout
from gymlink.types import Rollout, RolloutBatch, RolloutRequest, Sampling


class RolloutWorker:
    """Collects rollouts of the policy behind `engine`.

    Args:
        settings: from `gymlink.config.load_settings`.
        tokenizer: the policy's, with its chat template.
        engine: samples from the policy; closed with the worker.
        sampling: the trainer's, for every call of the policy that no other is given for.
        model: the name under which the policy is listed.

    Raises:
        ConfigError: the tokenizer's chat format cannot be used.
    """

    def __init__(
        self,
        settings: PolicySettings,
        *,
        tokenizer: Any,
        engine: Engine,
        sampling: Sampling,
        model: str = POLICY,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self.service = PolicyService(
            load_format(tokenizer, name=settings.alignment.format),
            engine,
            sampling,
            reasoning=settings.alignment.reasoning,
            model=model,
            claims=settings.gateway.ids_travel,
            hold_s=settings.gateway.pause_hold_s,
        )
        self._gateway: GatewayServer | None = None
        self._router: Router | None = None
        self._client: GymClient | None = None
        self._collector: Collector | None = None

    async def serve(
        self, secret: str, gateway: GatewaySettings, router: Router | None = None, *, routes: Sequence[Route] = ()
    ) -> str:
        """Bring up the gateway, with further `routes`; its URL, without `/v1`.

        Raises:
            ConfigError: the address cannot be had.
        """
        self._router = router or Router()
        self._gateway = GatewayServer(create_app(self.service, secret, self._router, routes), gateway)
        await self._gateway.start()
        return self._gateway.url

    def join(self, gym: Addresses, *, owner: int, secret: str | None = None, captures: Path | None = None) -> None:
        """Collect in this Gym from now on.

        Args:
            gym: where it answers.
            owner: this worker's name in rollout ids.
            secret: what the Gym asks for, if anything.
            captures: the folder of the Gym's own capture of token ids, if it has one (`gymlink.gym.capture_folder`).
        """
        settings = self._settings
        self._client = GymClient(gym, connections=settings.rollout.concurrency, secret=secret)
        self._collector = Collector(
            self._client,
            self.service,
            settings.rollout,
            settings.alignment,
            owner=owner,
            claims=Claims(self.service, captures) if settings.gateway.ids_travel else None,
        )

    async def collect(
        self,
        requests: Sequence[RolloutRequest],
        on_rollout: OnRollout | None = None,
        *,
        sampling: Sampling | None = None,
    ) -> RolloutBatch:
        """See `gymlink.rollout.Collector.collect`."""
        return await self._joined.collect(requests, on_rollout, sampling=sampling)

    async def rollout(self, request: RolloutRequest, *, sampling: Sampling | None = None) -> Rollout:
        """One rollout; a failure is a value. See `gymlink.rollout.Collector.rollout`."""
        return await self._joined.rollout(request, sampling=sampling)

    @property
    def _joined(self) -> Collector:
        if self._collector is None:
            raise GymError("This worker has not joined a Gym, or is closed.")
        return self._collector

    async def close(self) -> None:
        """Stop what was started, the engine included."""
        self._collector = None
        if self._client is not None:
            await self._client.close()
        if self._gateway is not None:
            await self._gateway.stop()
        if self._router is not None:
            await self._router.aclose()
        await self._engine.aclose()
