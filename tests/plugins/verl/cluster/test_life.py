"""The job's actor in a real Ray: one for all who ask, and nothing of it outlives the job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.slow
NOBODY = "http://127.0.0.1:9"


def test_all_who_ask_at_once_get_one_actor_also_in_a_second_job(drive: Callable[..., Any]) -> None:
    driver = drive("two_jobs", gym={"head_server": NOBODY})
    first, second = driver.told
    for job in (first, second):
        assert len(job["actors"]) == 1
        assert len(job["said"]) == 4
        for said in job["said"]:
            assert said.startswith("ConfigError: "), said
            assert f"No answer from a NeMo Gym head server at {NOBODY}" in said
        assert job["noted"].startswith(f"ConfigError: No answer from a NeMo Gym head server at {NOBODY}")
    assert first["actors"] != second["actors"]
    assert driver.process.wait(60) == 0, driver.said
    assert driver.left(30) == []


@pytest.mark.gym
@pytest.mark.parametrize("how", ["finishes", "is killed"])
def test_gym_ends_with_the_job_however_that_ends(drive: Callable[..., Any], keypad: dict[str, Any], how: str) -> None:
    driver = drive("one_gym", gym=keypad)
    assert driver.told == ["keypad_agent"]
    assert any(is_gyms(process) for process in driver.there())
    if how == "finishes":
        (driver.folder / "end").touch()
        assert driver.process.wait(60) == 0, driver.said
    else:
        driver.process.kill()
        driver.process.wait()
    assert driver.left(30) == []


def is_gyms(process: psutil.Process) -> bool:
    return any("gymlink-" in argument or argument.endswith("/bin/gym") for argument in process.cmdline())
