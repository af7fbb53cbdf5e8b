"""`make bench`: runs the benchmarks, writes benchmarks/results/<name>.json and the table in README.md.

Machines are noisy: what is compared is measured in one run, in turns, and the ratio is what counts.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from report import Result, check_page, times, write_result, write_table
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
NAMES = ("turn_cost", "capture_payload", "capture_gym", "long_rollout", "in_flight", "proxies", "gym_throughput")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"run only these of {', '.join(NAMES)}")
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes, whose figures mean nothing: shows that it runs"
    )
    parser.add_argument("--results", type=Path, help="where the JSON files go; by default results/, but for --small")
    parser.add_argument("--readme", type=Path, help="the page with the table; by default README.md when all are run")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in NAMES]:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    folder = asked.results or (None if asked.small else HERE / "results")
    page = asked.readme or (None if asked.small or asked.names else HERE.parent / "README.md")
    if page is not None:
        check_page(page)

    console = Console(width=max(Console().width, 150))  # a pipe has 80, too few for the figures
    results = []
    for name in asked.names or NAMES:
        started = time.monotonic()
        result: Result = importlib.import_module(name).run(small=asked.small)
        results.append(result)
        if folder is not None:
            write_result(folder, name, result)
        show(console, f"{name} ({time.monotonic() - started:.0f} s)", result)
    if page is not None:
        write_table(page, results)


def show(console: Console, title: str, result: Result) -> None:
    figures = Table(*result.rows[0], title=title)
    for row in result.rows:
        figures.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(figures)
    told = Table("measured", "gymlink", "compared with", "times better", "goal")
    for line in result.lines:
        verdict = f"{line.goal} ({'met' if line.met else 'MISSED'})" if line.goal else ""
        told.add_row(
            line.measured, line.gymlink, line.compared, "" if line.ratio is None else times(line.ratio), verdict
        )
    console.print(told)


if __name__ == "__main__":
    main()
