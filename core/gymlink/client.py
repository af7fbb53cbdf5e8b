"""The trainer's side of `gymlink serve`: a few plain calls, for a trainer of your own.

A client may be used from several threads at once. Every call raises what the gateway found wrong, as gymlink's errors.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import httpx
import orjson
from pydantic import TypeAdapter

from gymlink.errors import ConfigError, EngineError, GatewayError, GymlinkError, RolloutError
from gymlink.serve.wire import PREFIX, ClosedRollout, Collected, CollectedRollout, OpenedRollout, Status, TurnFigures
from gymlink.types import Segment

__all__ = [
    "ClosedRollout",
    "Collected",
    "CollectedRollout",
    "GatewayClient",
    "OpenedRollout",
    "RolloutHandle",
    "Segment",
    "Status",
    "TurnFigures",
]

_OPENED = TypeAdapter(OpenedRollout)
_CLOSED = TypeAdapter(ClosedRollout)
_COLLECTED = TypeAdapter(Collected)
_STATUS = TypeAdapter(Status)
_ERRORS: Final[Mapping[str, type[GymlinkError]]] = {"rollout_error": RolloutError, "engine_error": EngineError}
_CONNECT_S: Final = 10.0
POLL_S: Final = 0.5


@dataclass
class RolloutHandle:
    """A rollout that is open. Give `base_url` and `api_key` to whatever OpenAI client the agent uses.

    `closed` holds what was sampled, once the `with` block has ended.
    """

    rollout_id: str
    base_url: str
    anthropic_base_url: str
    api_key: str
    closed: ClosedRollout | None = None

    @property
    def segments(self) -> Sequence[Segment]:
        """What to train. Raises `RolloutError` unless the rollout was closed here."""
        if self.closed is None:
            raise RolloutError(
                f"The rollout {self.rollout_id} has not been closed here: it is still open, or was closed elsewhere."
            )
        return self.closed.segments


class GatewayClient:
    """Speaks to a running `gymlink serve`; a context manager.

    Args:
        url: where it answers, such as http://127.0.0.1:8000.
        api_key: the run's secret.
        timeout_s: for calls that answer at once; collecting and loading weights take as long as they take.

    Every call raises `GatewayError` when the gateway cannot be reached or does not know the run's secret,
    `ConfigError` when it refuses what is asked, `RolloutError` when too many rollouts failed, and `EngineError` when
    the policy did not do what was asked of it.
    """

    def __init__(self, url: str, api_key: str, *, timeout_s: float = 60.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"The gateway's address is {url!r}: write it whole, such as http://127.0.0.1:8000.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_S),
            trust_env=False,  # a proxy for the web is no way to a gateway of one's own
        )

    def wait(self, *, timeout_s: float = 1800.0) -> Status:
        """Wait until the gateway is ready; with a NeMo Gym to be installed first, that takes minutes.

        Raises:
            GatewayError: it was not ready within `timeout_s`.
        """
        until = time.monotonic() + timeout_s
        while not (status := self.status()).ready:
            if time.monotonic() > until:
                raise GatewayError(f"The gateway at {self.url} was not ready within {timeout_s:g} s; its log says why.")
            time.sleep(POLL_S)
        return status

    def status(self) -> Status:
        """How the gateway is: weight version, open rollouts, tokens sampled."""
        return _STATUS.validate_json(self._call("GET", "/status"))

    def collect(self, rows: Sequence[Mapping[str, Any]], *, samples: int = 1, **sampling: Any) -> Collected:
        """Collect `samples` rollouts of each Gym row, and wait for all of them.

        Args:
            rows: Gym rows, as in a JSONL file.
            samples: rollouts of each row, a group to compare with each other.
            sampling: `temperature`, `top_p`, `top_k`, `min_p`, `max_tokens` where they differ from the gateway's own.
        """
        asked = {"rows": list(rows), "samples": samples, "sampling": sampling}
        return _COLLECTED.validate_json(self._call("POST", "/collect", asked, wait=True))

    @contextmanager
    def rollout(self, *, deadline_s: float | None = None, **sampling: Any) -> Iterator[RolloutHandle]:
        """A rollout for an agent of your own: what it samples within the block is recorded, and is known after it.

        When the block raises, the rollout is closed and what it sampled is let go.
        """
        opened = self.open(deadline_s=deadline_s, **sampling)
        handle = RolloutHandle(opened.rollout_id, opened.base_url, opened.anthropic_base_url, opened.api_key)
        try:
            yield handle
        finally:
            handle.closed = self.close_rollout(handle.rollout_id)

    def open(self, *, deadline_s: float | None = None, **sampling: Any) -> OpenedRollout:
        """Open a rollout; see `rollout`, which closes it again."""
        return _OPENED.validate_json(self._call("POST", "/rollouts", {"deadline_s": deadline_s, "sampling": sampling}))

    def close_rollout(self, rollout_id: str, *, last_turn: int | None = None) -> ClosedRollout:
        """Close a rollout and get what it sampled. `last_turn` gave the final response, when the latest did not."""
        return _CLOSED.validate_json(self._call("POST", f"/rollouts/{rollout_id}/close", {"last_turn": last_turn}))

    def load_weights(self, path: str, *, version: int | None = None) -> int:
        """Have the engine sample from the weights in a folder; generation pauses meanwhile. Returns their version."""
        answer = self._call("POST", "/weights", {"path": path, "weight_version": version}, wait=True)
        return _STATUS.validate_json(answer).weight_version

    @contextmanager
    def paused(self, *, drain_s: float = 60.0) -> Iterator[Status]:
        """No generation begins within the block: the place to update an engine's weights yourself.

        After it the version is one more than before, or stays when the block raises.
        """
        status = self.pause(drain_s=drain_s)
        version = status.weight_version
        try:
            yield status
            version += 1
        finally:
            self.resume(version)

    def pause(self, *, drain_s: float = 60.0) -> Status:
        """Let no further generation begin, and wait up to `drain_s` seconds for those in flight (`in_flight`)."""
        return _STATUS.validate_json(self._call("POST", "/pause", {"drain_s": drain_s}, wait=True))

    def resume(self, weight_version: int | None = None) -> Status:
        """Sample again; `weight_version` is that of the weights from now on."""
        return _STATUS.validate_json(self._call("POST", "/resume", {"weight_version": weight_version}))

    def close(self) -> None:
        """Close the connections. The gateway goes on."""
        self._http.close()

    def __enter__(self) -> GatewayClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: str, path: str, body: Any = None, *, wait: bool = False) -> bytes:
        timeout = httpx.Timeout(None, connect=_CONNECT_S) if wait else httpx.USE_CLIENT_DEFAULT
        content = None if body is None else orjson.dumps(body)
        try:
            answer = self._http.request(method, PREFIX + path, content=content, timeout=timeout)
        except httpx.TimeoutException as error:
            raise GatewayError(f"The gateway at {self.url} did not answer in time.") from error
        except httpx.TransportError as error:
            message = f"The gateway at {self.url} cannot be reached: {error}. Does `gymlink serve` run there?"
            raise GatewayError(message) from error
        if answer.is_success:
            return answer.content
        raise _error(answer)


def _error(answer: httpx.Response) -> GymlinkError:
    try:
        told = orjson.loads(answer.content)["error"]
        message, kind = str(told["message"]), str(told["type"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message, kind = answer.text[:500], ""
    if kind in _ERRORS:
        return _ERRORS[kind](message)
    if answer.status_code in {400, 409, 413}:
        return ConfigError(message)
    return GatewayError(message)
