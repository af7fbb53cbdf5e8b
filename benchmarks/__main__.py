"""`make bench`: runs every benchmark, writes benchmarks/results/<name>.json and prints one table each.

Machines are noisy: what is compared is measured in one run, and the ratio is what counts.
"""

from __future__ import annotations

import importlib
import json
import platform
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
NAMES = ("prompt_cost",)


def main(wanted: list[str]) -> None:
    console = Console()
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    sys.path.insert(0, str(HERE))
    for name in wanted or NAMES:
        rows = importlib.import_module(name).run()
        content = {"python": platform.python_version(), "machine": platform.machine(), "rows": rows}
        (results / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        table = Table(*rows[0], title=name)
        for row in rows:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
        console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
