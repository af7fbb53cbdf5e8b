"""What a call through gymlink costs, beside proxies that do less: the same client, the same calls, in one run.

One agent calls again and again over a kept connection, then many do at once. Their conversations grow from 5k tokens,
a tool call and its result with each turn. Compared are the scripted answer itself (a server that answers at once), a
proxy that only passes bytes on to it (starlette and httpx), and LiteLLM's proxy before it. gymlink samples from a
scripted engine in its own process: it has one hop less to pay, and a prompt to keep exact. Its engine takes no time,
so a latency is what a call costs; beside each stands how busy the server was, so that a queue is not read as a delay.

CPU is that of the server that is named, with its threads and processes, without what stands behind it. Each server has
its turn in each round, and a figure is the median of the rounds. What gymlink sampled is checked: every turn but the
first of a conversation is an exact extension, and no token is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import aiohttp
import orjson
import psutil
import uv
from conversation import CODE, PROSE, SECRET, Agent, Text, Turn, tokenizer
from gateway_process import Script, gateway_process
from report import Line, Result, duration, short

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / ".venvs" / "peers"
LITELLM = "1.108.1"
START_S = 120.0
PLAIN, LITE, ITSELF, OURS = (
    "a proxy that passes bytes on",
    f"LiteLLM {LITELLM}",
    "the scripted answer itself",
    "gymlink",
)


@dataclass(frozen=True)
class Sizes:
    rounds: int = 3
    agents: int = 32
    turns: int = 24
    alone: int = 3
    """Conversations that the one agent has in a round."""
    turn: Turn = field(default_factory=lambda: Turn(sampled=128, observed=384))
    opening: int = 5_000
    litellm: bool = True


SMALL = Sizes(rounds=1, agents=2, turns=2, alone=1, opening=500, litellm=False)


@dataclass(frozen=True)
class _Server:
    name: str
    url: str
    pid: int

    def cpu_s(self) -> float:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
            return sum(one.user + one.system for one in times)
        return 0.0


@dataclass
class _Seen:
    """What the client saw of one server, by round; seconds."""

    latencies: list[list[float]] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)

    def p50(self) -> float:
        return median(median(one) for one in self.latencies)

    def rate(self) -> float:
        return median(len(one) / wall for one, wall in zip(self.latencies, self.walls, strict=True))

    def cpu_a_call(self) -> float:
        """Of so few calls that a process's clock has not ticked, the least that it can tell."""
        return max(median(cpu / len(one) for one, cpu in zip(self.latencies, self.cpus, strict=True)), 1e-6)

    def utilisation(self) -> float:
        return median(cpu / wall for cpu, wall in zip(self.cpus, self.walls, strict=True))


def run(*, small: bool = False) -> Result:
    sizes = SMALL if small else Sizes()
    script = Script.of(sizes.turn)
    names = [f"0.{number}" for number in range(sizes.rounds * (sizes.alone + sizes.agents))]
    with _servers(sizes, script) as peers, gateway_process(names, script) as gateway:
        servers = [*peers, _Server(OURS, gateway.url, gateway.pid)]
        alone = {server.name: _Seen() for server in servers}
        many = {server.name: _Seen() for server in servers}
        for at in range(sizes.rounds):
            mine = names[at * (sizes.alone + sizes.agents) : (at + 1) * (sizes.alone + sizes.agents)]
            for server in servers[at % len(servers) :] + servers[: at % len(servers)]:
                asyncio.run(_round(server, mine[: sizes.alone], 1, sizes, alone[server.name]))
                asyncio.run(_round(server, mine[sizes.alone :], sizes.agents, sizes, many[server.name]))
        kept = gateway.finish()
    assert kept.exact, "a turn was no exact extension"
    assert kept.sampled_tokens == kept.kept_tokens, "a sampled token is in no turn"
    assert set(kept.turns.values()) == {sizes.turns}, "a turn is missing"
    rows = [
        {
            "server": server.name,
            "one agent: p50 ms": alone[server.name].p50() * 1e3,
            "one agent: calls/s": alone[server.name].rate(),
            "one agent: utilisation": alone[server.name].utilisation(),
            f"{sizes.agents} agents: p50 ms": many[server.name].p50() * 1e3,
            f"{sizes.agents} agents: calls/s": many[server.name].rate(),
            f"{sizes.agents} agents: utilisation": many[server.name].utilisation(),
            "CPU ms a call": many[server.name].cpu_a_call() * 1e3,
        }
        for server in servers
    ]
    return Result(rows, [*_lines(alone, many, sizes)], asdict(sizes))


def _lines(alone: dict[str, _Seen], many: dict[str, _Seen], sizes: Sizes) -> Iterator[Line]:
    ours, plain = alone[OURS], alone[PLAIN]
    yield Line(
        "one agent, call after call, conversations from 5k tokens",
        f"p50 {duration(ours.p50())} at {ours.utilisation():.0%} of a core",
        f"{PLAIN}: {duration(plain.p50())} at {plain.utilisation():.0%}",
        plain.p50() / ours.p50(),
        "at most the proxy's",
        ours.p50() <= plain.p50(),
    )
    for name, goal in ((PLAIN, 2.0), (LITE, 8.0)):
        if name in many:
            mine, theirs = many[OURS], many[name]
            yield Line(
                f"{sizes.agents} agents at once",
                f"{short(mine.rate())} calls/s at {mine.utilisation():.0%} of a core",
                f"{name}: {short(theirs.rate())} calls/s at {theirs.utilisation():.0%}",
                mine.rate() / theirs.rate(),
                f"{goal:g} times",
                mine.rate() / theirs.rate() >= goal,
            )
    yield Line(
        "CPU for a call, the same",
        duration(many[OURS].cpu_a_call()),
        f"{PLAIN}: {duration(many[PLAIN].cpu_a_call())}",
        many[PLAIN].cpu_a_call() / many[OURS].cpu_a_call(),
        "at most the proxy's",
        many[OURS].cpu_a_call() <= many[PLAIN].cpu_a_call(),
    )


# -- the client --------------------------------------------------------------------------------------------------


async def _round(server: _Server, names: Sequence[str], at_once: int, sizes: Sizes, seen: _Seen) -> None:
    """The conversations of these names, so many at a time."""
    headers = {"Authorization": f"Bearer {SECRET}", "Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.url, connector=connector, headers=headers) as session:
        agents = [_agent(number, name, sizes) for number, name in enumerate(names)]
        await asyncio.gather(*[_warm_up(session) for _ in range(at_once)])
        latencies: list[float] = []
        cpu, started = server.cpu_s(), time.perf_counter()
        for first in range(0, len(agents), at_once):
            playing = (_play(session, agent, sizes.turns, latencies) for agent in agents[first : first + at_once])
            await asyncio.gather(*playing)
        seen.walls.append(time.perf_counter() - started)
        seen.cpus.append(server.cpu_s() - cpu)
        seen.latencies.append(latencies)


def _agent(number: int, rollout_id: str, sizes: Sizes) -> Agent:
    words, pages = Text(PROSE, start=101 * number), Text(CODE, start=101 * number)
    return Agent(rollout_id, sizes.turn, sizes.opening, words=words, pages=pages)


async def _warm_up(session: aiohttp.ClientSession) -> None:
    body = orjson.dumps({"model": "policy", "messages": [{"role": "user", "content": "hi"}]})
    async with session.post("/v1/chat/completions", data=body) as response:
        await response.read()


async def _play(session: aiohttp.ClientSession, agent: Agent, turns: int, latencies: list[float]) -> None:
    for _ in range(turns):
        body = agent.request()
        started = time.perf_counter()
        async with session.post("/v1/chat/completions", data=body) as response:
            content = await response.read()
        latencies.append(time.perf_counter() - started)
        assert response.status == 200, content
        agent.take(orjson.loads(content))


# -- the peers ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _servers(sizes: Sizes, script: Script) -> Iterator[list[_Server]]:
    """The peers, which end with the block."""
    python = Path(sys.executable) if not sizes.litellm else _environment()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        answer = Path(folder) / "answer.json"
        answer.write_bytes(_answer(script))
        itself = stack.enter_context(
            _peer(ITSELF, [str(python), str(HERE / "peer_servers.py"), "scripted", str(answer)])
        )
        plain = stack.enter_context(_peer(PLAIN, [str(python), str(HERE / "peer_servers.py"), "proxy", itself.url]))
        servers = [itself, plain]
        if sizes.litellm:
            servers.append(stack.enter_context(_litellm(python, itself.url, Path(folder))))
        yield servers


def _environment() -> Path:
    """The interpreter of the peers' environment, which is made when it is not there."""
    python = PEERS / "bin" / "python"
    if not python.exists():
        subprocess.run([uv.find_uv_bin(), "venv", "-q", "--python", sys.executable, str(PEERS)], check=True)
    wanted = [f"litellm[proxy]=={LITELLM}", "starlette", "uvicorn[standard]", "httpx"]
    subprocess.run([uv.find_uv_bin(), "pip", "install", "-q", "--python", str(python), *wanted], check=True)
    return python


def _answer(script: Script) -> bytes:
    """What the scripted engine's completion says, as a chat completion."""
    text = str(tokenizer().decode(list(script.token_ids), skip_special_tokens=True))
    said, _, called = text.partition("\n<tool_call>")
    call = orjson.loads(called.partition("</tool_call>")[0])
    function = {"name": call["name"], "arguments": orjson.dumps(call["arguments"]).decode()}
    message = {
        "role": "assistant",
        "content": said,
        "tool_calls": [{"id": "CALL_ID", "type": "function", "function": function}],
    }
    usage = {"prompt_tokens": 1, "completion_tokens": len(script.token_ids), "total_tokens": 1 + len(script.token_ids)}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls", "logprobs": None}
    head = {"id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": "policy"}
    return orjson.dumps({**head, "choices": [choice], "usage": usage})


@contextlib.contextmanager
def _peer(name: str, command: Sequence[str]) -> Iterator[_Server]:
    with _started(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield _Server(name, f"http://127.0.0.1:{port}", process.pid)


@contextlib.contextmanager
def _litellm(python: Path, url: str, folder: Path) -> Iterator[_Server]:
    settings = {
        "model_name": "policy",
        "litellm_params": {"model": "openai/policy", "api_base": f"{url}/v1", "api_key": "x"},
    }
    config = folder / "litellm.yaml"
    config.write_bytes(orjson.dumps({"model_list": [settings], "litellm_settings": {"telemetry": False}}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(python.parent / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    env = {
        **os.environ,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # it listens on this machine, for minutes
    }
    with (folder / "litellm.log").open("wb") as log, _started(command, env=env, stdout=log, stderr=log) as process:
        server = _Server(LITE, f"http://127.0.0.1:{port}", process.pid)
        if not asyncio.run(_is_up(server, process)):
            raise RuntimeError(f"{LITE} did not start: {(folder / 'litellm.log').read_text()[-2000:]}")
        yield server


@contextlib.contextmanager
def _started(command: Sequence[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, **options) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()


async def _is_up(server: _Server, process: subprocess.Popen[bytes]) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_S), aiohttp.ClientSession() as session:
            while process.poll() is None:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(server.url + "/health/liveliness") as answer:
                        if answer.status == 200:
                            return True
                await asyncio.sleep(0.2)
    return False
