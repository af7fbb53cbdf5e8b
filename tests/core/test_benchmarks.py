"""The benchmarks run and tell what they found. In tiny sizes: what their figures are is no matter here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = "# A page\n\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\n\nThe end.\n"


def bench(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """Run benchmarks in tiny sizes; their results and the page go to `folder`."""
    where = ["--results", str(folder / "results"), "--readme", str(folder / "README.md")]
    command = [sys.executable, "-W", "error", str(ROOT / "benchmarks"), "--small", *where, *names]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def check(folder: Path, *names: str) -> None:
    (folder / "README.md").write_text(PAGE)
    done = bench(folder, *names)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = []
    for name in names:
        told = json.loads((folder / "results" / f"{name}.json").read_text())
        assert told["benchmark"] == name
        assert told["rows"]
        for row in told["rows"]:
            # Another process's CPU is told in ticks of 10 ms: in so small a run it may be none.
            figures = {key: value for key, value in row.items() if key.endswith((" ms", "/s", "MB"))}
            assert all(value >= 0 for value in figures.values())
            assert not figures or any(value > 0 for value in figures.values())
            assert all(value > 0 for key, value in figures.items() if not key.endswith(" ms"))
        lines += told["lines"]
    before, _, rest = (folder / "README.md").read_text().partition("<!-- benchmarks:begin -->\n")
    table, _, after = rest.partition("<!-- benchmarks:end -->")
    assert (before, after) == ("# A page\n\n", "\n\nThe end.\n")
    assert "old" not in table
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {line['measured']}" for line in lines]


def test_those_that_need_no_gym(tmp_path: Path) -> None:
    check(tmp_path, "turn_cost", "capture_payload", "long_rollout", "in_flight", "proxies")
    in_flight = json.loads((tmp_path / "results" / "in_flight.json").read_text())
    assert [(row["rollouts"], row["lost"]) for row in in_flight["rows"]] == [(16, 0)]


@pytest.mark.slow
@pytest.mark.gym
def test_those_with_a_real_gym(tmp_path: Path) -> None:
    check(tmp_path, "capture_gym", "gym_throughput")


def test_a_page_without_a_place_for_the_table(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A page\n")
    done = bench(tmp_path, "capture_payload")
    assert done.returncode != 0
    assert "must have the lines '<!-- benchmarks:begin -->'" in done.stderr
    assert (tmp_path / "README.md").read_text() == "# A page\n"


def test_a_name_that_is_none(tmp_path: Path) -> None:
    done = bench(tmp_path, "turn_costs")
    assert done.returncode == 2
    assert "no benchmark 'turn_costs'; there are turn_cost," in done.stderr
