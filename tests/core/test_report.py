import io

import pytest
from rich.console import Console

from gymlink import report
from gymlink.report import Reporter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_wait_is_told_once_and_then_now_and_again(clock: list[float]) -> None:
    out = io.StringIO()
    say = Reporter(Console(file=out, width=80))
    for second in range(20):
        clock[0] += 1
        say(f"starting Gym ({second} s)")
    say("waiting for keypad (0 s)")
    assert out.getvalue().splitlines() == ["starting Gym (0 s)", "starting Gym (15 s)", "waiting for keypad (0 s)"]


def test_on_a_terminal_there_is_one_spinner_until_done() -> None:
    out = io.StringIO()
    say = Reporter(Console(file=out, force_terminal=True, width=80))
    say("starting Gym (0 s)")
    say("starting Gym (1 s)")
    say.done()
    say.done()
    shown = out.getvalue()
    assert "starting Gym (1 s)" in shown
    assert shown.index("\x1b[?25l") < shown.rindex("\x1b[?25h")  # the cursor was hidden, and is back
