"""The control routes of `gymlink serve`: what a trainer asks of the gateway. They need the run's secret.

Rollouts for agents of the trainer's own are opened and closed here, each with a deadline, so that one whose trainer has
died is forgotten. Gym rows are collected here. Around a weight update generation is paused, drained and resumed; every
turn says which weights sampled it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gymlink.align import build_segments
from gymlink.config import PolicySettings
from gymlink.engines import UpdatesWeights
from gymlink.errors import AlignmentError, ConfigError, EngineError, GymError, RolloutError
from gymlink.gateway import (
    WireError,
    guarded,
    json_response,
    new_rollout_id,
    parse_body,
    read_body,
    rollout_key,
    until_hang_up,
)
from gymlink.gym import parse_row
from gymlink.serve.metrics import CONTENT_TYPE, GatewayMetrics
from gymlink.serve.wire import (
    PREFIX,
    ClosedRollout,
    CloseRequest,
    Collected,
    CollectedRollout,
    CollectRequest,
    OpenedRollout,
    OpenRequest,
    PauseRequest,
    ResumeRequest,
    Status,
    TurnFigures,
    WeightsRequest,
)
from gymlink.session import Session
from gymlink.types import RolloutRequest

logger = logging.getLogger(__name__)

OWNER = 0
"""The number in rollout ids: one process serves them all."""
NOT_FOUND = 404
CONFLICT = 409
UNAVAILABLE = 503
RETRY_AFTER_S = 5


class Control:
    """What the routes do.

    Args:
        session: serves the gateway and, where a Gym runs, collects in it.
        settings: deadline and alignment of rollouts.
        collects: whether a Gym runs.
    """

    def __init__(self, session: Session, settings: PolicySettings, *, collects: bool) -> None:
        self._session = session
        self._service = session.service
        self._settings = settings
        self._collects = collects
        self._deadlines: dict[str, asyncio.TimerHandle] = {}
        self._updating = asyncio.Lock()
        self._metrics = GatewayMetrics(session.service)

    @property
    def routes(self) -> list[Route]:
        """For `create_app`."""
        table: Mapping[str, Callable[[Request], Awaitable[Response]]] = {
            "/rollouts": self.open,
            "/rollouts/{rollout_id}/close": self.close,
            "/collect": self.collect,
            "/pause": self.pause,
            "/resume": self.resume,
            "/weights": self.load_weights,
        }
        posts = [Route(PREFIX + path, guarded(handler), methods=["POST"]) for path, handler in table.items()]
        gets = {f"{PREFIX}/status": self.status, "/metrics": self.metrics}
        return [*posts, *(Route(path, guarded(handler), methods=["GET"]) for path, handler in gets.items())]

    async def open(self, request: Request) -> Response:
        """Open a rollout for an agent of the trainer's own."""
        asked = parse_body(OpenRequest, await read_body(request) or b"{}")
        rollout_id = new_rollout_id(OWNER)
        self._service.open(rollout_id, sampling=asked.sampling.applied_to(self._service.sampling))
        deadline = asked.deadline_s or self._settings.rollout.deadline_s
        loop = asyncio.get_running_loop()
        self._deadlines[rollout_id] = loop.call_later(deadline, self._forget, rollout_id, deadline)
        base = f"{self._session.url}/rollout/{rollout_id}"
        return json_response(
            OpenedRollout(rollout_id, f"{base}/v1", base, rollout_key(self._session.secret, rollout_id))
        )

    def _forget(self, rollout_id: str, deadline: float) -> None:
        logger.warning("rollout %s was not closed within %g s, and is forgotten", rollout_id, deadline)
        del self._deadlines[rollout_id]
        self._service.close(rollout_id)

    async def close(self, request: Request) -> Response:
        """Close a rollout and hand over what it sampled."""
        asked = parse_body(CloseRequest, await read_body(request) or b"{}")
        rollout_id = request.path_params["rollout_id"]
        rollout = self._service.rollouts.find(rollout_id) if rollout_id in self._deadlines else None
        if rollout is None:
            message = f"The rollout {rollout_id!r} is not open: it was closed, or its deadline has passed."
            raise WireError(NOT_FOUND, message, kind="not_found_error", param="rollout")
        how = asked.on_history_rewrite or self._settings.alignment.on_history_rewrite
        try:
            segments, dropped = build_segments(rollout.record.turns, on_history_rewrite=how, last_turn=asked.last_turn)
        except AlignmentError as error:
            raise WireError(400, str(error), kind="invalid_request_error", param="last_turn") from error
        self._deadlines.pop(rollout_id).cancel()
        self._service.close(rollout_id)
        self._metrics.count(rollout.record.turns)
        return json_response(
            ClosedRollout(
                rollout_id=rollout_id,
                segments=segments,
                turns=tuple(map(TurnFigures.of, rollout.record.turns)),
                sampled_tokens=rollout.sampled_tokens,
                dropped=dict(Counter(dropped) + rollout.undelivered),
                seconds_in_model=rollout.seconds_in_model,
                engine_error=rollout.engine_error,
                overflowed=rollout.overflowed,
            )
        )

    async def collect(self, request: Request) -> Response:
        """Collect rollouts of Gym rows; the answer comes when all have ended. Who hangs up cancels them."""
        asked = parse_body(CollectRequest, await read_body(request))
        if not self._collects:
            raise WireError(
                400,
                "No Gym runs here, so no rows can be collected: start `gymlink serve` with --config gym.yaml, or open "
                "rollouts for agents of your own.",
                kind="invalid_request_error",
            )
        if not self._session.ready:
            raise WireError(
                UNAVAILABLE,
                "NeMo Gym is not up: it is still starting, or it stops. The status says when it is `ready`.",
                kind="not_ready",
                retry_after_s=RETRY_AFTER_S,
            )
        requests = _requests(asked, self._session.agents)
        sampling = asked.sampling.applied_to(self._service.sampling)
        try:
            batch = await until_hang_up(request, self._session.collecting(requests, sampling=sampling))
        except (RolloutError, GymError) as error:
            raise WireError(500, str(error), kind="rollout_error") from error
        for rollout in batch.rollouts:
            self._metrics.count(rollout.turns)
        rollouts = [CollectedRollout.of(rollout, rollout.request.index // asked.samples) for rollout in batch.rollouts]
        return json_response(Collected(rollouts, batch.metrics))

    async def pause(self, request: Request) -> Response:
        """Let no further generation begin; the answer says how many are still in flight."""
        asked = parse_body(PauseRequest, await read_body(request) or b"{}")
        self._service.pause()
        await self._service.drain(asked.drain_s)
        return self._status()

    async def resume(self, request: Request) -> Response:
        """Sample again, with the weights of the version that is told."""
        asked = parse_body(ResumeRequest, await read_body(request) or b"{}")
        self._service.resume(asked.weight_version)
        return self._status()

    async def load_weights(self, request: Request) -> Response:
        """Pause, drain, have the engine load weights from a folder, and resume."""
        asked = parse_body(WeightsRequest, await read_body(request))
        engine = self._service.engine
        if not isinstance(engine, UpdatesWeights):
            raise WireError(
                400,
                f"{type(engine).__name__} cannot load weights from a folder: pause, update them as your engine does, "
                "and resume with their weight_version.",
                kind="invalid_request_error",
            )
        async with self._updating:
            version = engine.weight_version + 1 if asked.weight_version is None else asked.weight_version
            self._service.pause()
            if left := await self._service.drain(asked.drain_s):
                self._service.resume()
                raise WireError(
                    CONFLICT,
                    f"{left} generations were still in flight after {asked.drain_s:g} s, so the weights were not "
                    "touched. Give a longer drain_s, or a smaller max_tokens.",
                    kind="conflict_error",
                )
            try:
                await engine.load_weights(asked.path, version)
            except EngineError as error:
                message = f"{error} The gateway stays paused: load weights that fit, or resume with the old ones."
                raise WireError(500, message, kind="engine_error") from error
            self._service.resume(version)
        return self._status()

    async def status(self, _: Request) -> Response:
        """How the gateway is."""
        return self._status()

    async def metrics(self, _: Request) -> Response:
        """The same for Prometheus."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    def _status(self) -> Response:
        service, totals = self._service, self._service.totals
        return json_response(
            Status(
                model=service.model,
                weight_version=service.engine.weight_version,
                paused=service.paused,
                in_flight=service.in_flight,
                open_rollouts=len(service.rollouts),
                requests=totals.requests,
                sampled_tokens=totals.sampled_tokens,
                unattributed_tokens=totals.unattributed_tokens,
                abandoned_tokens=totals.abandoned_tokens,
                max_context=service.engine.max_context,
                ready=self._session.ready,
                agents=self._session.agents if self._collects and self._session.ready else (),
            )
        )


def _requests(asked: CollectRequest, agents: Sequence[str]) -> list[RolloutRequest]:
    """`samples` rollouts of each row, siblings side by side."""
    try:
        rows = [parse_row(orjson.dumps(row), f"row {number}", agents) for number, row in enumerate(asked.rows)]
    except ConfigError as error:
        raise WireError(400, str(error), kind="invalid_request_error", param="rows") from error
    return [
        RolloutRequest(row, number * asked.samples + sample, group=str(number))
        for number, row in enumerate(rows)
        for sample in range(asked.samples)
    ]
