from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from nemo_r3 import progress as module
from nemo_r3.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands still except where a test moves `now`."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_terminal_sees_counts_and_rates_on_one_line(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    progress = Progress(enabled=True)
    progress.begin("step 3/40")
    clock.now += 2
    progress("reflection", 5, 8, 1000)
    progress("retry", 3, 8, 200)  # too soon to be drawn
    progress.during("update")
    redrawn = "\r\033[Kstep 3/40 reflection 5/8"
    assert terminal.getvalue() == f"{redrawn} | 500 tok/s{redrawn}, retry 3/8 | 600 tok/s | update ..."
    progress.say("done")
    assert terminal.getvalue().endswith("\r\033[Kdone\n")


def test_a_log_file_gets_whole_lines_only(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stdout", log)
    progress = Progress(enabled=True)
    progress.begin("step 1/2")
    clock.now += 2
    progress("reflection", 8, 8, 800)
    progress.during("update")
    assert log.getvalue() == ""
    progress.say(f"step 1/2 {progress.rates()}")
    assert log.getvalue() == "step 1/2 reflection 8/8 | 400 tok/s\n"


def test_other_ranks_print_nothing_even_on_a_terminal(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    progress = Progress(enabled=False)
    progress.begin("step 1/2")
    clock.now += 2
    progress("reflection", 8, 8, 800)
    progress.during("update")
    progress.say("done")
    assert terminal.getvalue() == ""
