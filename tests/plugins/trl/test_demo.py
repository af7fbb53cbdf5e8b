"""The demo's own refusals; that it trains is tested in tests/e2e."""

from __future__ import annotations

from pathlib import Path

import pytest

from gymlink.demo import environments_root
from gymlink.errors import PluginError
from gymlink.hookspecs import DemoRequest
from gymlink_trl.demo import run


def test_options_of_the_trainer_are_refused_by_name(tmp_path: Path) -> None:
    request = DemoRequest(
        output=tmp_path,
        environments=environments_root(),
        steps=1,
        report=lambda text: None,
        on_start=lambda steps: None,
        on_step=lambda figures: None,
        arguments=("--learning_rate", "1"),
    )
    with pytest.raises(PluginError, match=r"takes no options of the trainer, and got '--learning_rate 1'"):
        run(request)
    assert not list(tmp_path.iterdir())
