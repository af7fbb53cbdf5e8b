"""One Gym for a job of many workers: started once, and the one address at which Gym and the workers meet.

A worker may run in another process or on another node. It needs what `HostedGym` holds and nothing else; what Gym
calls for it comes back through the front (`gymlink.gateway.front`), which knows every enlisted worker by its number.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gymlink.config import GatewaySettings, Settings
from gymlink.errors import ConfigError, GymError, GymStartError
from gymlink.gateway import GatewayServer, Router, agent_url, create_front
from gymlink.gym import GymServers, attach_gym, start_gym

Report = Callable[[str], None]
FRONT = -1
"""The front's own number: it owns no rollout."""


@dataclass(frozen=True, slots=True)
class HostedGym:
    """What a worker needs to know. Its `agents` are addresses for a `gymlink.gym.GymClient` with this `secret`."""

    head_url: str
    secret: str
    agents: Mapping[str, str]
    gym_version: str | None


class GymHost:
    """Starts Gym, or attaches to one, and serves the front.

    Args:
        settings: from `gymlink.config.load_settings`.
        run_dir: logs of Gym's servers go here; made when missing.
        front: where the front listens; the settings' gateway when not given.
        report: told in a few words what is being waited for.
    """

    def __init__(
        self, settings: Settings, run_dir: Path, *, front: GatewaySettings | None = None, report: Report | None = None
    ) -> None:
        self._settings = settings
        self._run_dir = run_dir
        self._address = front or settings.gateway
        self._report = report or (lambda _: None)
        self._router = Router(FRONT)
        self._front: GatewayServer | None = None
        self._gym: GymServers | None = None
        self._bringing_up: asyncio.Future[GymServers] | None = None
        self._stopped = False
        self._workers = 0

    async def start(self) -> HostedGym:
        """Bring up the front, then Gym. What was started is stopped again when this fails or is cancelled.

        Raises:
            ConfigError: settings that cannot work. GymStartError: Gym did not come up, or was stopped meanwhile.
        """
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> HostedGym:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        attached = await asyncio.to_thread(find_attached, self._settings, self._report)
        secret = policy_key(attached) if attached else secrets.token_urlsafe(24)
        agents: dict[str, str] = {}
        self._front = GatewayServer(create_front(secret, self._router, agents), self._address)
        await self._front.start()
        url = self._front.url
        if attached is not None:
            check_policy_url(attached, url)
            gym = attached
        else:
            starting = asyncio.to_thread(
                start_gym,
                self._settings.gym,
                policy_base_url=f"{url}/v1",
                policy_api_key=secret,
                token_ids=self._settings.gateway.token_ids,
                run_dir=self._run_dir,
                report=self._report_unless_stopped,
            )
            self._bringing_up = asyncio.ensure_future(starting)
            gym = await asyncio.shield(self._bringing_up)
        self._gym = gym
        agents.update(gym.agents)
        return HostedGym(url, secret, {name: agent_url(url, name) for name in agents}, gym.version)

    def _report_unless_stopped(self, text: str) -> None:
        """A thread cannot be cancelled: the one that starts Gym learns here that nobody wants it any more."""
        if self._stopped:
            raise GymStartError("Gym was stopped before it was up.")
        self._report(text)

    def enlist(self, url: str) -> int:
        """A worker's gateway answers at `url`: the number that its rollout ids carry."""
        worker, self._workers = self._workers, self._workers + 1
        self._router.peers[str(worker)] = url
        return worker

    def check(self) -> None:
        """Raises `GymError` when a server of the Gym that was started here has died."""
        if self._gym is None:
            raise GymError("No Gym runs: it was not started, or it was stopped.")
        if self._gym.owned:
            self._gym.check()

    async def stop(self) -> None:
        """Stop all that was started, Gym first. It may be called at any time, and twice."""
        self._stopped = True
        self._gym, bringing_up, self._bringing_up = None, self._bringing_up, None
        if bringing_up is not None:
            await asyncio.wait([bringing_up])
            if bringing_up.exception() is None:
                await asyncio.to_thread(bringing_up.result().stop)
        if self._front is not None:
            await self._front.stop()
        await self._router.aclose()


def find_attached(settings: Settings, report: Report) -> GymServers | None:
    """The Gym that runs already, when the settings name one."""
    head = settings.gym.head_server
    if head is None:
        return None
    report(f"attaching to the Gym at {head}")
    return attach_gym(head)


def check_policy_url(gym: GymServers, gateway_url: str) -> None:
    """An attached Gym calls the policy where its own configuration says; that must be this gateway."""
    configured = gym.config.get("policy_base_url")
    urls = [configured] if isinstance(configured, str) else list(configured or [])
    if f"{gateway_url}/v1" not in [url.rstrip("/") for url in urls]:
        raise ConfigError(
            f"The Gym at {gym.head_url} calls the policy at {configured!r}, and this gateway answers at "
            f"{gateway_url}/v1. Set gateway.host and gateway.port to the address that Gym was started with, or start "
            "Gym with policy_base_url set to this one."
        )


def policy_key(gym: GymServers) -> str:
    """The secret with which an attached Gym calls the policy."""
    key = gym.config.get("policy_api_key")
    if not isinstance(key, str) or key.startswith("${"):
        raise ConfigError(
            f"The Gym at {gym.head_url} has policy_api_key {key!r}, which cannot be read from here. Start it with the "
            "key itself, such as ++policy_api_key=<a secret of yours>."
        )
    return key
