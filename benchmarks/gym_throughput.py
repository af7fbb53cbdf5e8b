"""Rollouts per second through a real Gym agent server: collected by gymlink, and by Gym's `gym eval run --no-serve`.

Both run the same rows on the same running servers, as many at once, and both get the policy from the same gateway, with
the scripted engine behind it. They take turns, each beginning every other time, so that a busy machine slows both; the
ratio is the median of those of each pair.

gymlink's time is the whole of `Session.collect`: from the rows to the batch with its tokens, rollouts.jsonl written.
Gym's is what its own progress bar tells at the end: from the first row to the last result, without starting Python,
reading the rows, sorting and aggregating. Gym's program collects no tokens to train on.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median

from conversation import tokenizer
from report import Line, Result, short
from running_gym import collect, gym_of, running, settings

from gymlink.config import Settings
from gymlink.gym import prepare_gym, read_rows
from gymlink.gym.install import clean_environment
from gymlink.session import Session
from gymlink.types import RolloutRequest

ENVIRONMENTS = Path(__file__).parents[1] / "examples" / "environments"
ROWS = ENVIRONMENTS / "resources_servers" / "keypad" / "data" / "train.jsonl"
RATE = re.compile(r"Collecting rollouts: 100%.*?, *([\d.]+)it/s\]")
TIMEOUT_S = 300.0
NOISE = 0.03
"""A difference below this is taken for none: the pairs of one run differ by more."""


@dataclass(frozen=True)
class Sizes:
    rollouts: int = 384
    concurrency: int = 64
    repeats: int = 6


SMALL = Sizes(rollouts=16, concurrency=4, repeats=1)


def run(*, small: bool = False) -> Result:
    sizes = SMALL if small else Sizes()
    asked = settings(ENVIRONMENTS, "keypad", concurrency=sizes.concurrency)
    digits = tokenizer().encode("1 2 3 4<|im_end|>", add_special_tokens=False)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder, running(asked, digits) as session:
        rows = list(islice(cycle(read_rows(ROWS, agents=session.agents)), sizes.rollouts))
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        requests = [RolloutRequest(row, number) for number, row in enumerate(rows)]
        collect(session, requests[: sizes.concurrency])  # warms up
        for number in range(sizes.repeats):
            ways = [(ours, lambda: _collect(session, requests)), (theirs, lambda: _gym_eval_run(session, asked, file))]
            for rates, way in ways if number % 2 == 0 else reversed(ways):
                rates.append(way())
    ratio = median(one / other for one, other in zip(ours, theirs, strict=True))
    row = {
        "rollouts": sizes.rollouts,
        "at once": sizes.concurrency,
        "gymlink rollouts/s, p50": median(ours),
        "gymlink rollouts/s, best": max(ours),
        "gym eval run rollouts/s, p50": median(theirs),
        "gym eval run rollouts/s, best": max(theirs),
        "ratio": ratio,
    }
    measured = f"rollouts/s through a real Gym agent server, {sizes.concurrency} at once"
    compared = f"`gym eval run --no-serve`: {short(median(theirs))}"
    line = Line(measured, short(median(ours)), compared, ratio, "not slower", ratio >= 1 - NOISE)
    return Result([row], [line], asdict(sizes))


def _collect(session: Session, requests: Sequence[RolloutRequest]) -> float:
    """Rollouts per second."""
    started = time.perf_counter()
    collect(session, requests)
    return len(requests) / (time.perf_counter() - started)


def _gym_eval_run(session: Session, asked: Settings, rows: Path) -> float:
    """Rollouts per second, as Gym's program tells it."""
    gym = prepare_gym(asked.gym, print)
    host, _, port = gym_of(session).head_url.removeprefix("http://").rpartition(":")
    results = rows.with_name("results.jsonl")
    command = [str(gym.prefix / "bin" / "gym"), "eval", "run", "--no-serve", "--input", str(rows)]
    command += ["--output", str(results), "--concurrency", str(asked.rollout.concurrency)]
    command += [f"++head_server.host={host}", f"++head_server.port={port}"]
    done = subprocess.run(
        command,
        cwd=rows.parent,
        env=clean_environment(first_on_path=[gym.prefix / "bin"]),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    collected = results.read_text(encoding="utf-8").splitlines()
    assert len(collected) == len(rows.read_text(encoding="utf-8").splitlines())
    assert all(json.loads(line)["reward"] == 1 for line in collected)
    return float(RATE.findall(done.stderr)[-1])
