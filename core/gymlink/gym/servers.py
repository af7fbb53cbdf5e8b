"""Starts NeMo Gym and stops it again, or attaches to one that runs already; `GymServers` is the handle to either.

What was started here ends with the handle, with an exception, with Ctrl-C, and with this process however it dies
(`gymlink.gym.guard`). What was attached to is never stopped. Two Gyms on one machine do not meet: each has ports of its
own, and a Ray of its own.

Gym does not quote paths, writes into its working directory, and its Ray needs short ones for its sockets. So it lives
in a private folder /tmp/gymlink-*, which holds links to the user's servers, to the prepared environments and to the
log folder, and which goes away with it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil
import yaml
from uv import find_uv_bin

from gymlink.config import GymSettings, TokenIdsPath
from gymlink.errors import ConfigError, GymError, GymStartError
from gymlink.gym.configs import POLICY_KEY_VARIABLE, Plan, plan, server_instances
from gymlink.gym.guard import GuardedProcess
from gymlink.gym.install import (
    REPORT_EVERY_S,
    GymEnvironment,
    Report,
    clean_environment,
    last_lines,
    prepare_gym,
    prepare_server,
)
from gymlink.hydra import hydra_override, hydra_value

AGENTS = "responses_api_agents"
LINKED = (AGENTS, "responses_api_models", "resources_servers", "environments", "benchmarks", "env.yaml")
"""What Gym looks for in its working directory before it looks into its own install."""
PORT_BLOCK = 200
PORTS = range(20_000, 32_000, PORT_BLOCK)
"""Below the ports that systems hand out by themselves, above those that Ray prefers."""
_POLL_S = 0.3
_PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Server:
    """One running server. `kind` is "responses_api_agents" and the like; `folder` the name of its code's folder."""

    name: str
    kind: str
    folder: str
    url: str
    pid: int | None = None


class GymServers:
    """A running Gym. Use it as a context manager, or call `stop`.

    Attributes:
        head_url: where the head server answers.
        version: of nemo-gym; None for an attached Gym.
        owned: whether it was started here and `stop` ends it.
        config: Gym's global config; secrets in it are references to the environment.
        servers: every server by its name.
        agents: name to base URL of those that take rows.
        log_dir: one log for each server, and Gym's own gym.log; None for an attached Gym.
    """

    def __init__(
        self,
        head_url: str,
        config: Mapping[str, Any],
        servers: Mapping[str, Server],
        *,
        version: str | None = None,
        log_dir: Path | None = None,
        process: GuardedProcess | None = None,
    ) -> None:
        self.head_url = head_url
        self.config = config
        self.servers = servers
        self.agents = {server.name: server.url for server in servers.values() if server.kind == AGENTS}
        self.version = version
        self.log_dir = log_dir
        self._process = process

    @property
    def owned(self) -> bool:
        return self._process is not None

    @property
    def pids(self) -> tuple[int, ...]:
        """Every process that belongs to a Gym started here, its guard first."""
        return self._process.pids if self._process is not None else ()

    def check(self) -> None:
        """Do nothing while all servers run.

        Raises:
            GymError: one has died; the message ends with its last lines. An attached Gym does not answer.
        """
        if self._process is None or self.log_dir is None:
            _fetch(self.head_url, "/server_instances", GymError)
        elif (dead := _find_dead(self._process, self.servers, self.log_dir)) is not None:
            raise GymError(dead)

    def stop(self) -> None:
        """End a Gym that was started here, and everything under it; leave an attached one alone. Idempotent."""
        if self._process is not None:
            self._process.stop()

    def __enter__(self) -> GymServers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def attach_gym(head_url: str) -> GymServers:
    """A handle to the Gym whose head server answers at `head_url`.

    Raises:
        ConfigError: nothing answers there, or what answers is not Gym.
    """
    head_url = head_url.rstrip("/")
    config = _fetch(head_url, "/global_config_dict_yaml", ConfigError)
    instances = _fetch(head_url, "/server_instances", ConfigError)
    config = yaml.safe_load(config) if isinstance(config, str) else None
    if not isinstance(config, dict) or not isinstance(instances, list):
        raise ConfigError(f"What answers at {head_url!r} is not NeMo Gym's head server. Check gym.head_server.")
    return GymServers(head_url, config, _servers(config, instances, head_url))


def start_gym(
    settings: GymSettings,
    *,
    policy_base_url: str | Sequence[str],
    policy_api_key: str,
    policy_model_name: str = "policy",
    token_ids: TokenIdsPath = "gateway",  # noqa: S107 - no secret
    run_dir: Path,
    report: Report,
) -> GymServers:
    """Start Gym and wait until every server answers.

    Args:
        settings: what to run and on which Gym; environments are made first where they are missing.
        policy_base_url: where Gym's model server reaches the policy, ending in /v1; a list is shared by session.
        policy_api_key: its bearer token; reaches Gym through the environment only.
        policy_model_name: the model that Gym asks for.
        token_ids: whether they travel on Gym's messages, where the model server is not the configuration's own.
        run_dir: `logs` is made in it.
        report: told what is being done, with the seconds so far, every two seconds.

    Raises:
        ConfigError: the settings cannot work, or Gym refuses the configuration.
        GymStartError: a server died or did not come up in time; ends with the last lines of its log.
        GymError: an environment could not be made.
    """
    gym = prepare_gym(settings, report)
    log_dir = (run_dir / "logs").absolute()
    with contextlib.ExitStack() as undo:
        private = _Private(settings.root or Path.cwd(), log_dir)
        undo.callback(private.remove)
        env = _environment(gym, private, policy_api_key)
        overrides = [item for path, value in settings.overrides.items() for item in hydra_override(path, value)]
        planned = plan(
            gym,
            settings.config_paths,
            overrides,
            token_ids=token_ids,
            root=private.root,
            cwd=private.work,
            env=env,
            report=report,
        )
        for folder in planned.folders(private.work):
            private.link_environment(folder.kind, folder.name, prepare_server(gym, folder, planned.pins, report))
        head_url, own, claim = _place(planned, settings.overrides, private)
        undo.callback(claim.close)
        # From here on the settings are known to be good: nothing was written to run_dir before.
        log_dir.mkdir(parents=True, exist_ok=True)
        for old in log_dir.glob("*.log"):
            old.unlink()  # Gym appends, and the end of a log must be the end of this run
        command = [
            str(gym.prefix / "bin" / "gym"),
            "env",
            "start",
            f"+config_paths={hydra_value(planned.config_paths)}",
            *hydra_override("policy_base_url", policy_base_url),
            *hydra_override("policy_api_key", f"${{oc.env:{POLICY_KEY_VARIABLE}}}"),
            *hydra_override("policy_model_name", policy_model_name),
            *own,
            *overrides,
        ]
        with (log_dir / "gym.log").open("wb") as output:
            process = GuardedProcess(
                command, env=env, cwd=private.work, output=output, remove=private.path, keep_open=[claim.fileno()]
            )
        undo.callback(process.stop)
        startup = _Startup(process, log_dir, time.monotonic() + settings.start_timeout_s, report)
        config, instances = startup.wait_for_head(head_url, len(planned.servers))
        servers = _servers(config, instances, head_url)
        startup.wait_for_servers(servers)
        undo.pop_all()
        claim.close()  # the guard holds its own copy
        return GymServers(head_url, config, servers, version=gym.version, log_dir=log_dir, process=process)


class _Private:
    """The short private folder in which one Gym lives."""

    def __init__(self, root: Path, log_dir: Path) -> None:
        self.root = root.absolute()
        parent = "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()  # noqa: S108  (made private below)
        self.path = Path(tempfile.mkdtemp(prefix="gymlink-", dir=parent))
        self.work = self.path / "work"
        self.work.mkdir()
        self.environments = self.path / "environments"
        self.logs = self.path / "logs"
        self.logs.symlink_to(log_dir)
        for name in LINKED:
            if (self.root / name).exists():
                (self.work / name).symlink_to(self.root / name)

    def link_environment(self, kind: str, name: str, prefix: Path) -> None:
        link = self.environments / kind / name / ".venv"
        link.parent.mkdir(parents=True)
        link.symlink_to(prefix)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _environment(gym: GymEnvironment, private: _Private, policy_api_key: str) -> dict[str, str]:
    uv = Path(find_uv_bin()).parent
    env = clean_environment(first_on_path=[gym.prefix / "bin", gym.interpreter.path.parent, uv])
    home = env.setdefault("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
    # Otherwise Gym puts these into its working directory, and downloads anew for every run.
    env.setdefault("HF_DATASETS_CACHE", str(Path(home) / "datasets"))
    env[POLICY_KEY_VARIABLE] = policy_api_key
    # Without a folder of its own, Ray joins whatever cluster it finds on the machine.
    env["RAY_TMPDIR"] = str(private.path)
    env["RAY_USAGE_STATS_ENABLED"] = "0"
    env["COLUMNS"] = "1000"  # rich would break messages at 80 columns
    return env


def _place(planned: Plan, overrides: Mapping[str, Any], private: _Private) -> tuple[str, list[str], socket.socket]:
    """Where Gym listens: the head server's URL, the overrides that say all this to Gym, and the claim on the ports."""
    given = {*planned.given, *(path.split(".")[0] for path in overrides)}
    claim, low = _claim_ports()
    host = str(planned.head_server.get("host", "127.0.0.1"))
    port = int(planned.head_server["port"]) if "head_server" in given else low + 1
    if not _is_free(host, port):
        claim.close()
        raise ConfigError(
            f"Port {port} on {host!r} is in use, and head_server.port asks for it. "
            f"Leave it out to get a free one, or give that Gym as gym.head_server to attach to it."
        )
    own = {
        "head_server.host": host,
        "head_server.port": port,
        "port_range_low": low + 2,
        "port_range_high": low + PORT_BLOCK - 1,
        "skip_venv_if_present": True,
        "uv_venv_dir": str(private.environments),
        "uv_cache_dir": os.environ.get("UV_CACHE_DIR") or str(Path.home() / ".cache" / "uv"),
        "nemo_gym_log_dir": str(private.logs),
    }
    said = [item for path, value in own.items() if path not in given for item in hydra_override(path, value)]
    return f"http://{_reachable(host)}:{port}", said, claim


def _claim_ports() -> tuple[socket.socket, int]:
    """A block of ports for one Gym. Its first port, bound for as long as the Gym lives, is the claim to the rest."""
    for low in random.sample(PORTS, len(PORTS)):
        claim = socket.socket()
        try:
            claim.bind(("127.0.0.1", low))
        except OSError:
            claim.close()
            continue
        if _is_free("127.0.0.1", low + 1):
            return claim, low
        claim.close()
    raise GymStartError(f"No free block of ports between {PORTS.start} and {PORTS.stop} for Gym's servers.")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in {"0.0.0.0", "::", ""} else host  # noqa: S104  (an address to replace, not to bind)


def _servers(config: Mapping[str, Any], instances: Sequence[Mapping[str, Any]], head_url: str) -> dict[str, Server]:
    pids = {str(instance.get("process_name")): instance.get("pid") for instance in instances}
    head_host = httpx.URL(head_url).host
    servers = {}
    for name, kind, folder, settings in server_instances(config):
        host = str(settings.get("host") or head_host)
        # A server that listens everywhere, or on its own loopback, is reached where the head server is.
        host = head_host if host != _reachable(host) or host in {"127.0.0.1", "localhost"} else host
        servers[name] = Server(name, kind, folder, f"http://{host}:{settings.get('port')}", pids.get(name))
    return servers


@dataclass(frozen=True, slots=True)
class _Startup:
    """The wait until a Gym that was started is ready. `deadline` is on the monotonic clock."""

    process: GuardedProcess
    log_dir: Path
    deadline: float
    report: Report

    def wait_for_head(self, head_url: str, servers: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Gym's whole config and the instances, once all `servers` are started (they may not answer yet)."""
        for _ in self._beats(lambda: "starting Gym"):
            if self.process.returncode is not None:
                raise _why_it_ended(self.process, self.log_dir)
            with contextlib.suppress(GymError):
                instances = _fetch(head_url, "/server_instances", GymError)
                if len(instances) >= servers:
                    return yaml.safe_load(_fetch(head_url, "/global_config_dict_yaml", GymError)), instances
        raise self._too_late("Gym's head server", self.log_dir / "gym.log")

    def wait_for_servers(self, servers: Mapping[str, Server]) -> None:
        waiting = dict(servers)
        with httpx.Client(trust_env=False, timeout=_PROBE_TIMEOUT_S) as client:
            for _ in self._beats(lambda: f"waiting for {', '.join(waiting)}"):
                for name, server in [*waiting.items()]:
                    with contextlib.suppress(httpx.HTTPError):
                        client.get(server.url)  # any answer will do: not every server has a page at its root
                        del waiting[name]
                if not waiting:
                    return
                if self.process.returncode is not None:
                    raise _why_it_ended(self.process, self.log_dir)
                if (dead := _find_dead(self.process, servers, self.log_dir)) is not None:
                    raise GymStartError(dead)
        raise self._too_late(", ".join(waiting), _log_of(next(iter(waiting)), self.log_dir))

    def _beats(self, what: Callable[[], str]) -> Iterator[None]:
        """Yield now and every fraction of a second until the deadline, saying what is waited for."""
        started = time.monotonic()
        said = started - REPORT_EVERY_S
        while (now := time.monotonic()) < self.deadline:
            yield
            if now - said >= REPORT_EVERY_S:
                self.report(f"{what()} ({now - started:.0f} s)")
                said = now
            time.sleep(_POLL_S)

    def _too_late(self, what: str, log: Path) -> GymStartError:
        return GymStartError(
            f"{what} did not answer in time (gym.start_timeout_s). The end of {log}:\n{last_lines(log)}"
        )


def _find_dead(process: GuardedProcess, servers: Mapping[str, Server], log_dir: Path) -> str | None:
    """What to say about a server, or Gym itself, that has ended; None when all run."""
    for server in servers.values():
        if server.pid is not None and not _is_alive(server.pid):
            return _obituary(server.name, log_dir)
    if (status := process.returncode) is not None:
        return f"Gym ended with status {status}. The end of {log_dir / 'gym.log'}:\n{last_lines(log_dir / 'gym.log')}"
    return None


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def _log_of(name: str, log_dir: Path) -> Path:
    return log_dir / f"{name.replace('/', '_')}.log"  # as Gym names it


def _obituary(name: str, log_dir: Path) -> str:
    log = _log_of(name, log_dir)
    return f"Gym's server {name!r} has ended. The end of {log}:\n{last_lines(log)}"


def _why_it_ended(process: GuardedProcess, log_dir: Path) -> GymError | ConfigError:
    log = log_dir / "gym.log"
    said = last_lines(log, 200)
    if dead := re.findall(r"Process `(.+?)` finished unexpectedly", said):
        return GymStartError(_obituary(dead[-1], log_dir))
    if refused := re.search(r"^Error: (.+)", said, re.MULTILINE | re.DOTALL):
        return ConfigError(f"Gym refuses this configuration:\n{refused[1].strip()}")
    return GymStartError(f"Gym ended with status {process.returncode}. The end of {log}:\n{last_lines(log)}")


def _fetch(head_url: str, path: str, error: type[ConfigError | GymError]) -> Any:
    """The JSON at a path of the head server; an `error` says why it cannot be had."""
    try:
        response = httpx.get(head_url + path, timeout=_PROBE_TIMEOUT_S, trust_env=False)
        response.raise_for_status()
        return response.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as why:
        raise error(f"No answer from a NeMo Gym head server at {head_url}: {why or type(why).__name__}.") from why
