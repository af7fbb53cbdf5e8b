"""`gymlink serve`: the gateway for a trainer that has no plugin, until it is stopped."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console

from gymlink.config import PolicySettings
from gymlink.errors import ConfigError
from gymlink.types import Sampling

API_KEY_VARIABLE = "GYMLINK_API_KEY"
ENGINE_KEY_VARIABLE = "GYMLINK_ENGINE_KEY"


def serve(  # noqa: PLR0917 - a program's options
    engine: Annotated[str, typer.Option(help="What samples: vllm, sglang, transformers or scripted.")],
    model: Annotated[str, typer.Option(help="The policy's name or folder, of which the tokenizer is loaded.")],
    config: Annotated[
        Path | None, typer.Option(help="A gym.yaml; with `gym` in it, NeMo Gym is started, and its rows collected.")
    ] = None,
    url: Annotated[
        list[str] | None, typer.Option(help="Where a vLLM or SGLang server answers; repeat it for several.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Another name or folder for the tokenizer.")] = None,
    host: Annotated[str | None, typer.Option(help="Where to listen; 127.0.0.1 when nothing else is said.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0, the default, takes a free port.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=API_KEY_VARIABLE, help="What clients must send; made up and shown when not given."),
    ] = None,
    engine_key: Annotated[
        str | None, typer.Option(envvar=ENGINE_KEY_VARIABLE, help="What the engine's own servers ask for.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="How every call is sampled, whatever an agent asks.")] = 1,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of one answer; an agent may ask less.")] = None,
    max_context: Annotated[int | None, typer.Option(min=2, help="Tokens of prompt and answer together.")] = None,
    reply: Annotated[str | None, typer.Option(help="What the scripted engine says.")] = None,
    run_dir: Annotated[Path, typer.Option(help="Where rollouts.jsonl and Gym's logs go.")] = Path("runs/serve"),
    as_json: Annotated[bool, typer.Option("--json", help="Say where it answers in one line of JSON.")] = False,
) -> None:
    """Serve a policy to agents, and what they sampled, token by token, to a trainer of your own; until Ctrl-C."""
    from gymlink.report import Reporter
    from gymlink.serve.program import ServeRequest, serving

    progress = Reporter(Console(stderr=True))
    request = ServeRequest(
        engine=engine,
        model=model,
        settings=_settings(config, host, port),
        run_dir=run_dir,
        tokenizer=tokenizer,
        urls=tuple(url or ()),
        engine_key=engine_key,
        sampling=Sampling(temperature, top_p, top_k, min_p, max_tokens),
        max_context=max_context,
        reply=reply,
        secret=api_key,
    )
    try:
        with serving(request, progress) as running:
            progress.done()
            _tell(running, as_json=as_json)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped")
    finally:
        progress.done()


def _settings(config: Path | None, host: str | None, port: int | None) -> PolicySettings:
    """The file's settings, with what the command line says of the address."""
    from gymlink.config import load_policy_settings

    settings = load_policy_settings(config) if config is not None else PolicySettings()
    address = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    if host == "":
        raise ConfigError("--host is empty: give an address of this machine, such as 127.0.0.1.")
    return settings.model_copy(update={"gateway": settings.gateway.model_copy(update=address)})


def _tell(running: Any, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.buffer.write(orjson.dumps(running.as_json(), option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.buffer.flush()
        return
    lines = [
        f"The policy {running.model!r} answers at {running.url}/v1",
        f"API key: {running.secret}",
        *([f"Rows of NeMo Gym {running.gym_version}: {', '.join(running.agents)}"] if running.agents else []),
        "Ctrl-C stops it.",
    ]
    Console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
