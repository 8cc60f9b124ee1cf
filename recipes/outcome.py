"""What a run shows: its learning curve, as it goes, its report, and a line at its end."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_r3 import curve, entry, signals, trackers
from nemo_r3.actor.manifest import complete, step_path
from nemo_r3.files import json_lines
from nemo_r3.html_report import write_report
from nemo_r3.progress import warn
from nemo_r3.series import column, ends_of, number
from recipes.metrics import versions
from recipes.setup import Setup


def draw_curve(setup: Setup) -> None:
    """Draws the steps so far to curve.png; only warns if that fails."""
    if setup.world.is_main:
        with _only_a_warning("curve.png"):
            curve.draw(json_lines(setup.run.metrics, unread=[]), setup.run.path / "curve.png")


def report(setup: Setup) -> None:
    """Writes the run so far to report.html and says where; only warns if that fails."""
    if setup.world.is_main:
        with _only_a_warning("report.html"):
            setup.progress.say(f"report: {write_report(setup.config)}")


@contextmanager
def _only_a_warning(file: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001  a picture must not end a run
        warn(f"no {file}: {error}")


def conclude(setup: Setup, argv: Sequence[str]) -> None:
    """Records what a finished run ran with; says what it has achieved, and what to do next."""
    run, config = setup.run, setup.config
    run.add_to_summary(versions=versions())
    if not setup.world.is_main or not config.train.steps:
        return
    draw_curve(setup)
    report(setup)
    metrics = json_lines(run.metrics, unread=[])
    if found := best(metrics, run.checkpoints, config.train.start_from):
        setup.progress.say(found)
    verb = "the same command with recipes.evaluate"
    if setup.world.size == 1:
        verb = f"python -m recipes.evaluate {shlex.join(argv)}"
    setup.progress.say(
        f"done: {change(column(metrics, 'retry_success'))}; curve: {run.path / 'curve.png'}; next: {verb}"
    )


def conclude_early(setup: Setup, end: Exception, step: int) -> None:
    """Says what a run that stops has saved, and ends its trackers: a rank that left first would have the others killed.

    `step` is the last one that is saved; 0: none.
    """
    if step:
        setup.progress.say(f"step {step} is saved")
    code = signals.STOPPED if isinstance(end, signals.Stopped) else entry.USER_ERROR
    setup.world.on_main(lambda: trackers.close(code))


def best(metrics: Sequence[Mapping[str, Any]], checkpoints: Path, start: str) -> str:
    """After which step the second try on held-out problems was best, in words; empty if none was measured.

    A line of metrics.jsonl has the rates of the weights that sampled its step: those after the step before, and at
    first those of the checkpoint `start`, or without one the starting model's.
    """
    measured = [(number(line, "held_out/second_try"), number(line, "step") - 1) for line in metrics]
    known = [(value, step) for value, step in measured if math.isfinite(value + step)]
    if not known:
        return ""
    value, step = max(known, key=lambda pair: pair[0])  # of equals the first
    kept = step_path(checkpoints, int(step))
    place = str(kept) if kept in complete(checkpoints) else "no checkpoint has it"
    place = place if step else start or "untrained"
    return f"best second try on held-out problems: {value:.2f} after step {step:.0f} ({place})"


def change(success: Sequence[float]) -> str:
    """How retry success has changed over a run's steps, in words."""
    count = ends_of(len(success))
    if not count:
        return "no change to show"
    first, last = statistics.fmean(success[:count]), statistics.fmean(success[-count:])
    ends = f"mean of the first and last {count} steps" if count > 1 else "the first step and the last"
    return f"retry success {first:.2f} -> {last:.2f} ({ends})"
