"""A real NeMo Gym with one environment, whose policy is the scripted engine behind our gateway."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from conversation import tokenizer

from gymlink.config import Settings, parse_settings
from gymlink.engines import ScriptedEngine
from gymlink.gym import GymServers
from gymlink.session import Session
from gymlink.types import RolloutBatch, RolloutRequest, RolloutStatus, Sampling


def settings(root: Path, environment: str, *, concurrency: int, token_ids: str = "gateway") -> Settings:
    return parse_settings(
        {
            "gym": {"root": str(root), "config_paths": [f"resources_servers/{environment}/configs/{environment}.yaml"]},
            "rollout": {"concurrency": concurrency},
            "gateway": {"token_ids": token_ids},
        }
    )


@contextlib.contextmanager
def running(settings: Settings, sampled: Sequence[int]) -> Iterator[Session]:
    """A session, whose policy samples the same each time."""
    with tempfile.TemporaryDirectory(prefix="gymlink-bench-") as folder:
        engine = ScriptedEngine(lambda _: sampled)
        with Session(
            settings, tokenizer=tokenizer(), engine=engine, sampling=Sampling(), run_dir=Path(folder), report=print
        ) as session:
            yield session


def gym_of(session: Session) -> GymServers:
    gym = session._gym  # the session's own business, but where its servers are is what we measure
    assert gym is not None
    return gym


def collect(session: Session, requests: Sequence[RolloutRequest]) -> RolloutBatch:
    """Raises `AssertionError` when a rollout was not completed: figures of failures are worth nothing."""
    batch = session.collect(requests)
    assert all(rollout.status is RolloutStatus.COMPLETED for rollout in batch.rollouts), batch.metrics
    return batch


def cpu_s(pid: int) -> float:
    """CPU seconds so far of a process and of all below it."""
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(one.cpu_times().user + one.cpu_times().system for one in family)
