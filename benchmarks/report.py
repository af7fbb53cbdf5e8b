"""What a benchmark found, and how it is told: a JSON file for each, and one table of all of them in README.md.

The table is written only from one run of all benchmarks, so that its figures belong together.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
PACKAGES = ("gymlink", "fastokens", "orjson", "pydantic", "starlette", "uvicorn", "tokenizers", "transformers")

Row = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: what was measured, gymlink's figure, and what it is compared with."""

    measured: str
    gymlink: str
    compared: str = ""
    """The other way and its figure: "double render: 100 ms"."""
    ratio: float | None = None
    """How many times better gymlink is."""
    goal: str = ""
    met: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """All figures of one benchmark, and what the table says of them."""

    rows: Sequence[Row]
    lines: Sequence[Line]
    sizes: Mapping[str, Any] = field(default_factory=dict)


def machine() -> dict[str, str | int]:
    """Where the figures come from."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": next(names, platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def write_result(folder: Path, name: str, result: Result) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": name,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {package: version(package) for package in PACKAGES},
        "sizes": result.sizes,
        "rows": result.rows,
        "lines": [asdict(line) for line in result.lines],
    }
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def markdown(results: Sequence[Result]) -> str:
    """The table of README.md."""
    where = machine()
    table = ["| measured | gymlink | compared with | times better |", "| --- | --- | --- | --- |"]
    for line in (line for result in results for line in result.lines):
        ratio = "" if line.ratio is None else times(line.ratio)
        table.append(f"| {line.measured} | {line.gymlink} | {line.compared} | {ratio} |")
    told = f"One run of `make bench` on {where['cores']} cores ({where['processor']}), Python {where['python']}."
    return "\n".join([told, "", *table])


def check_page(readme: Path) -> None:
    """Raises `ValueError` for a page without exactly one place for the table."""
    page = readme.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{readme} must have the lines {BEGIN!r} and {END!r} once each: the table goes between them.")


def write_table(readme: Path, results: Sequence[Result]) -> None:
    """Put the table between the two markers."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{markdown(results)}\n{END}{after}", encoding="utf-8")


def times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 20 else f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}"


def duration(seconds: float) -> str:
    return f"{short(seconds)} s" if seconds >= 1 else f"{short(seconds * 1e3)} ms"


def megabytes(count: float) -> str:
    return f"{short(count / 1e6)} MB"


def short(value: float) -> str:
    """Two or three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2g}"
