"""One tiny model for all runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from verl_runs import Run, train


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gymlink_tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def run_verl(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`run_verl(*overrides, rows=..., val_rows=..., env=...)` runs it to its end."""
    try:
        version("verl")
    except PackageNotFoundError:
        pytest.skip("verl is not installed")

    def run(*overrides: str, **more: Any) -> Run:
        return train(tmp_path_factory.mktemp("run"), tiny, overrides, **more)

    return run
