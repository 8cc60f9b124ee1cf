from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from nemo_r3 import progress as module
from nemo_r3 import signals
from nemo_r3.errors import describe
from nemo_r3.progress import Pace, Progress, Turns, duration, warn


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands still except where a test moves `now`."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_terminal_sees_shares_and_rates_on_one_line(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    progress = Progress(enabled=True)
    progress.begin("step 3/40")
    assert terminal.getvalue() == "\r\033[Kstep 3/40 ...", "something at once"
    clock.now += 2
    progress({"reflection": Turns(3, 8, 800), "retry": Turns(2, 8, 200)})
    progress({"reflection": Turns(4, 8, 900), "retry": Turns(3, 8, 300)})  # too soon to be drawn
    progress.during("update")
    drawn = ("reflection 38%, retry 25% | 500 tok/s", "reflection 50%, retry 38% | 600 tok/s | update ...")
    assert terminal.getvalue().endswith("".join(f"\r\033[Kstep 3/40 {line}" for line in drawn))
    progress.say("done")
    progress.during("save")
    assert terminal.getvalue().endswith("\r\033[Kdone\n\r\033[Kstep 3/40 save ...")


def test_a_live_line_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "20")
    Progress(enabled=True).begin("evaluate the starting model:")
    warn("it is long")
    assert terminal.getvalue() == "\r\033[Kevaluate the starti\r\033[Kwarning: it is long\n"


def test_what_a_model_wrote_cannot_act_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    wrote = "\x1b]52;c;ZXZpbA==\x07 3\r4 \u202e5\r\n\t日本"
    Progress(enabled=True).say(f"answer {wrote}")
    assert capsys.readouterr().out == "answer ⟨U+001B⟩]52;c;ZXZpbA==⟨U+0007⟩ 3⟨U+000D⟩4 ⟨U+202E⟩5\n\t日本\n"
    assert describe(ValueError("no number: \x1b[2J")) == "ValueError (no number: ⟨U+001B⟩[2J)"


def test_a_log_file_gets_a_line_after_half_a_minute_of_silence(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    progress = Progress(enabled=True, engines=4)
    progress.begin("step 1/2")
    clock.now += 20
    progress({"reflection": Turns(6, 8, 800)})
    progress.during("update")
    assert capsys.readouterr().out == ""
    clock.now += 20
    progress({"reflection": Turns(8, 8, 1000)})
    progress.during("update")
    assert capsys.readouterr().out == "step 1/2 reflection 100% | 100 tok/s\n", "of all engines"
    clock.now += 31
    progress.say("something")
    progress.during("refit")
    assert capsys.readouterr().out == "something\n"


def test_items_are_counted_over_all_parts_and_say_how_long_the_rest_will_take(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    progress = Progress(enabled=True)
    clock.now += 600  # of start-up, which are no part of a rate
    progress.begin("mine")
    progress.part(1000, 500, 5000)  # an earlier process mined 1,000
    clock.now += 60
    progress({"attempt": Turns(256, 256, 30_000)})
    progress.part(1500, 500, 5000)
    clock.now += 60
    progress({"attempt": Turns(128, 256, 15_000)})
    clock.now += 60
    progress({"attempt": Turns(128, 256, 30_000, begun=64)})  # an eighth of the part more, in turns that have not ended
    assert capsys.readouterr().out.splitlines() == [
        "mine 1,500/5,000 | 500 tok/s | 7 min left",
        "mine 1,750/5,000 | 375 tok/s | 9 min left",
        "mine 1,750/5,000 | 333 tok/s | 11 min left",
    ]


def test_no_time_is_predicted_before_a_first_turn_has_ended(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    progress = Progress(enabled=True)
    progress.begin("mine")
    progress.part(0, 100, 100)
    for done, begun in ((0, 45.0), (1, 45.0)):
        assert not progress.is_due()
        clock.now += 60
        assert progress.is_due()
        progress({"attempt": Turns(done, 100, 600 * (1 + done), begun)})
    assert capsys.readouterr().out.splitlines() == ["mine 0/100 | 10 tok/s", "mine 1/100 | 10 tok/s | 2 min left"]


def test_a_second_rollout_under_one_title_adds_to_the_first(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    progress = Progress(enabled=True)
    progress.begin("evaluate")
    for attempts in (3000, 1000):
        for tokens in (0, attempts):
            clock.now += 40
            progress({"attempt": Turns(min(tokens, 8), 8, tokens)})
        for reflections in (0, 40):
            progress({"reflection": Turns(0, 8, reflections), "retry": Turns(0, 8, 0)})
    clock.now += 40
    progress.during("refit")
    assert capsys.readouterr().out.splitlines() == [
        "evaluate attempt 0% | 0 tok/s",
        "evaluate attempt 100% | 38 tok/s",
        "evaluate attempt 0% | 25 tok/s",
        "evaluate attempt 100% | 25 tok/s",
        "evaluate attempt 100%, reflection 0%, retry 0% | 20 tok/s | refit ...",
    ]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"SLURM_PROCID": "1"}, False),
        ({"RANK": "4", "SLURM_PROCID": "0"}, False),  # torchrun under srun: a task is a node
        ({"RANK": "0", "SLURM_PROCID": "1"}, True),
    ],
)
def test_rank_0_is_known_before_the_ranks_have_joined(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool
) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert module.is_rank_0() == expected


def test_other_ranks_print_nothing_even_on_a_terminal(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    progress = Progress(enabled=False)
    progress.begin("step 1/2")
    clock.now += 40
    progress({"reflection": Turns(8, 8, 800)})
    progress.during("update")
    progress.say("done")
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("make", [os.pipe, os.openpty])
def test_a_pipe_or_terminal_that_nobody_reads_is_a_request_to_stop_and_no_error(
    make: Callable[[], tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "_noted", [])
    reader, writer = make()
    with os.fdopen(writer, "w") as output:
        os.close(reader)
        monkeypatch.setattr(sys, "stdout", output)
        progress = Progress(enabled=True)
        progress.say("step 1/40")
        progress.say("step 1 is saved")
    assert signals.noted() == "closed output"


def test_the_pace_is_that_of_the_latest_steps(clock: SimpleNamespace) -> None:
    pace = Pace(40)
    clock.now += 50  # the first step takes longer
    assert pace.after(11) == "50.0 s/step, 24 min left"
    for step in range(12, 40):
        clock.now += 2
        said = pace.after(step)
    assert said == "2.0 s/step, 2 s left"
    assert pace.after(40) == "1.8 s/step"


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 99, 100, 5940, 7200)] == ["0 s", "99 s", "2 min", "99 min", "2.0 h"]
