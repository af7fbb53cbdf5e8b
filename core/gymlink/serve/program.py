"""`gymlink serve`: an engine, the gateway over it, its control routes, and a Gym where one is asked for.

What is started is stopped again in reverse, however the program ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gymlink.config import PolicySettings, Settings
from gymlink.engines import ServedEngine
from gymlink.errors import ConfigError, PluginError
from gymlink.hookspecs import EngineKind, EngineRequest
from gymlink.plugins import find_engine, resolve
from gymlink.runfile import check_model
from gymlink.serve.control import Control
from gymlink.serve.memory import return_large_buffers
from gymlink.session import Report, Session
from gymlink.types import Sampling

TOKENIZER = "gymlink_transformers.tokenizer:load_tokenizer"
"""Loads a tokenizer; imported when it is used, since the core needs no transformers."""


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """What `gymlink serve` is asked for. `model` is the policy's name or folder, `tokenizer` another place for its own.

    `urls` are the servers of a remote engine, and `engine_key` what they ask for; `secret` is what this gateway's
    clients must carry, made up when None.
    """

    engine: str
    model: str
    settings: PolicySettings
    run_dir: Path
    tokenizer: str | None = None
    urls: tuple[str, ...] = ()
    engine_key: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_context: int | None = None
    reply: str | None = None
    secret: str | None = None


@dataclass(frozen=True, slots=True)
class Serving:
    """A gateway that runs: where, with which secret, and what it collects in."""

    url: str
    secret: str
    model: str
    gym_version: str | None = None
    agents: tuple[str, ...] = ()

    def as_json(self) -> Mapping[str, Any]:
        """For scripts; `base_url` is for OpenAI's clients."""
        return {
            "url": self.url,
            "base_url": f"{self.url}/v1",
            "api_key": self.secret,
            "model": self.model,
            "gym_version": self.gym_version,
            "agents": list(self.agents),
        }


@contextmanager
def serving(request: ServeRequest, report: Report) -> Iterator[Serving]:
    """Serve for as long as the block lasts.

    Raises:
        ConfigError: something that is asked for cannot work.
        PluginError: the engine is not known, or what it needs is not installed.
        EngineError: its servers do not answer.
        GymStartError: Gym did not come up.
    """
    kind = _engine_kind(request)
    for name in filter(None, (request.model, request.tokenizer)):
        check_model(name, Path.cwd(), what="--model" if name == request.model else "--tokenizer")
    report("loading the tokenizer")
    tokenizer = _load(TOKENIZER, "serve", request.tokenizer or request.model)
    wanted = EngineRequest(
        model=request.model,
        tokenizer=tokenizer,
        sampling=request.sampling,
        urls=request.urls,
        api_key=request.engine_key,
        max_context=request.max_context,
        reply=request.reply,
    )
    report(f"preparing the engine: {kind.summary}")
    if kind.remote:
        return_large_buffers()  # no model is in this process
        asyncio.run(_probe(_load(kind.make, kind.extra, wanted)))
    engine = _load(kind.make, kind.extra, wanted)
    collects = isinstance(request.settings, Settings)

    def routes(session: Session) -> Any:
        return Control(session, request.settings, collects=collects).routes

    session = Session(
        request.settings,
        tokenizer=tokenizer,
        engine=engine,
        sampling=request.sampling,
        run_dir=request.run_dir,
        report=report,
        model=request.model,
        secret=request.secret,
        routes=routes,
    )
    with session:
        yield Serving(
            url=session.url,
            secret=session.secret,
            model=request.model,
            gym_version=session.gym_version if collects else None,
            agents=session.agents if collects else (),
        )


def _engine_kind(request: ServeRequest) -> EngineKind:
    kind = find_engine(request.engine)
    if kind.remote and not request.urls:
        raise ConfigError(f"The engine {kind.name!r} samples on servers that run already: say where with --url.")
    if wrong := [url for url in request.urls if not url.startswith(("http://", "https://"))]:
        raise ConfigError(f"--url is {wrong[0]!r}: write the whole address, such as http://{wrong[0]}.")
    if request.urls and not kind.remote:
        raise ConfigError(f"The engine {kind.name!r} runs in this process, so --url {request.urls[0]} has no meaning.")
    return kind


async def _probe(engine: ServedEngine) -> None:
    """Say whether its servers answer before Gym is started. An engine belongs to one event loop: this one ends here."""
    try:
        await engine.probe()
    finally:
        await engine.aclose()


def _load(path: str, extra: str | None, *arguments: Any) -> Any:
    try:
        function = resolve(path)
    except ImportError as error:
        install = f"pip install 'gymlink[{extra}]'" if extra else "see the message"
        raise PluginError(f"What is needed cannot be imported ({error}): {install}") from error
    return function(*arguments)
