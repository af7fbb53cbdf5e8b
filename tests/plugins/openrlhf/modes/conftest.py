"""One tiny model for all runs, and the files that a run of OpenRLHF reads, as the command line writes them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from gym_rows import EXAM, Row, write_gym, write_rows
from openrlhf_runs import HEADS, Run, train


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gymlink_tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"), heads=HEADS)


@pytest.fixture(scope="session")
def run_openrlhf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`run_openrlhf(*flags, rows=..., gym=...)` runs it to its end; `gym` are more sections of gym.yaml."""
    try:
        version("openrlhf")
    except PackageNotFoundError:
        pytest.skip("openrlhf is not installed")
    from gymlink_openrlhf.agent import write_agent
    from gymlink_openrlhf.prompts import write_prompts

    def run(*flags: str, rows: Sequence[Row], gym: dict[str, Any] | None = None) -> Run:
        folder = tmp_path_factory.mktemp("run")
        agent = write_agent(write_gym(folder, **(gym or {})), folder / "gym")
        prompts = folder / "prompts.jsonl"
        exams = folder / "exams.jsonl"
        write_prompts(write_rows(folder / "rows.jsonl", rows), prompts)
        write_prompts(write_rows(folder / "exam_rows.jsonl", EXAM), exams, evaluation=True)
        return train(folder, tiny, agent, prompts, [f"--eval.dataset={exams}", *flags])

    return run
