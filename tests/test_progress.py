from __future__ import annotations

import io
import sys

import pytest

from nemo_r3.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_counts_and_rates_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    progress = Progress(enabled=True)
    progress.begin("step 3/40")
    progress._drawn = 0.0
    progress("reflection", 5, 8, 100)
    progress("retry", 3, 8, 20)
    progress.during("update")
    shown = terminal.getvalue()
    assert "step 3/40 reflection 5/8" in shown
    assert "retry 3/8" in shown and "tok/s | update ..." in shown
    assert "\n" not in shown
    progress.say("done")
    assert terminal.getvalue().endswith("\r\033[Kdone\n")


def test_a_log_file_gets_whole_lines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stdout", log)
    progress = Progress(enabled=True)
    progress.begin("step 1/2")
    progress("reflection", 8, 8, 800)
    progress.during("update")
    assert log.getvalue() == ""
    progress.say(f"step 1/2 {progress.rates()}")
    assert log.getvalue().startswith("step 1/2 reflection 8/8 | ")
    assert log.getvalue().endswith(" tok/s\n")


def test_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(enabled=False)
    progress.say("x")
    assert capsys.readouterr().out == ""
