"""`run_verl` starts verl's own program; what holds of any trainer's program is tested with the core."""

from __future__ import annotations

from pathlib import Path

import pytest

from gymlink.errors import RolloutError
from gymlink_verl.launch import run_verl


@pytest.mark.slow
def test_verls_own_program_refuses_what_it_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VERL_PLATFORM", raising=False)  # left by our stand-ins for GPUs, where another test has them
    with (tmp_path / "said").open("wb") as output, pytest.raises(RolloutError, match="exit status 1"):
        run_verl(["trainer.no_such_key=1"], run_dir=tmp_path, output=output)
    assert "no_such_key" in (tmp_path / "said").read_text()
