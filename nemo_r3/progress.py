"""`Progress`: what a person sees while a run works. One live line on a terminal; elsewhere, a line now and then."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple, TextIO

from nemo_r3 import signals
from nemo_r3.visible import visible

REDRAW = 0.1
"""Seconds between two updates of the live line."""
QUIET = 30.0
"""Seconds between two lines where there is no terminal."""
RECENT = 10
"""The durations of this many steps predict how long the rest will take."""
UNREAD = (errno.EPIPE, errno.EIO)
"""Errors of writing to a pipe without a reader, and to a terminal that was closed."""


def is_rank_0() -> bool:
    """Whether this process is rank 0, before the ranks have joined."""
    return (os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")) == "0"


def put(text: str, file: TextIO, end: str = "\n") -> None:
    """Prints at once, on a terminal in place of the live line.

    If nobody reads that any more, the process is asked to stop, and goes on without output. So a run saves that is
    ended together with its terminal, or by a Ctrl-C that also ended the `tee` after it.
    """
    try:
        print(f"\r\033[K{text}" if file.isatty() else text, file=file, end=end, flush=True)
    except OSError as error:
        if error.errno not in UNREAD:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        signals.note("closed output")


def warn(text: str) -> None:
    """Prints a warning to standard error, on rank 0."""
    if is_rank_0():
        put(f"warning: {text}", sys.stderr)


class Turns(NamedTuple):
    """How far a rollout is with the turns of a phase, on rank 0's engine."""

    ended: int
    total: int
    tokens: int  # sampled so far, those of turns under way, too
    begun: float = 0.0  # how many whole turns those under way are worth


class Progress:
    """Shows how far the current work is, on rank 0.

    Args:
        enabled: False prints nothing (ranks other than 0).
        engines: how many sample at once; all are assumed to be as fast as rank 0's, the only one that reports.
    """

    def __init__(self, enabled: bool, engines: int = 1) -> None:
        self._enabled, self._engines = enabled, engines
        self._live = enabled and sys.stdout.isatty()
        self._shown = time.monotonic()
        self._start("")

    def _start(self, title: str) -> None:
        self._title, self._begun = title, time.monotonic()
        self._tokens = self._reported = 0  # of all rollouts under this title, of the one under way
        self._counts: dict[str, Turns] = {}  # by phase
        self._first = self._done = self._count = self._total = 0  # items: done at first, done, under way, in all

    def begin(self, title: str) -> None:
        """Starts a new line, e.g. "step 3/40"."""
        self._start(title)
        if self._live:
            self._draw("...")

    def part(self, done: int, count: int, total: int) -> None:
        """Of `total` items, `done` are done, and the turns reported next belong to the next `count`."""
        if not self._total:
            self._first = done
        self._done, self._count, self._total, self._counts, self._reported = done, count, total, {}, 0

    def __call__(self, counts: Mapping[str, Turns]) -> None:
        """Reports all phases of a rollout; its first report has no tokens yet."""
        tokens = sum(turns.tokens for turns in counts.values())
        if tokens < self._reported:  # another rollout has begun under this title
            self._reported = 0
            if self._counts.keys() & counts.keys():
                self._counts = {}
        self._tokens += tokens - self._reported
        self._reported, self._counts = tokens, {**self._counts, **counts}
        self._show(self.rates())

    def is_due(self) -> bool:
        """Whether a report now would be shown."""
        return self._enabled and time.monotonic() - self._shown > (REDRAW if self._live else QUIET)

    def during(self, phase: str) -> None:
        """Names a phase without counts (update, refit, save)."""
        text = f"{self.rates()} | {phase} ..." if self._counts else f"{phase} ..."
        if self._live:
            self._draw(text)
        else:
            self._show(text)

    def rates(self) -> str:
        """E.g. "reflection 47%, retry 38% | 2,310 tok/s", or "1,200/5,000 | 2,310 tok/s | 12 min left"."""
        seconds = max(time.monotonic() - self._begun, 1e-3)
        speed = f"{self._tokens * self._engines / seconds:,.0f} tok/s"
        if not self._total:
            shares = (f"{phase} {turns.ended / max(turns.total, 1):.0%}" for phase, turns in self._counts.items())
            return f"{', '.join(shares)} | {speed}"
        ended, turns, _, begun = map(sum, zip((0, 0, 0, 0.0), *self._counts.values(), strict=True))
        share = self._count / max(turns, 1)
        done = self._done + int(share * ended)
        text = f"{done:,}/{self._total:,} | {speed}"
        if done == self._first:
            return text
        worth, all_new = done - self._first + share * begun, self._total - self._first
        return f"{text} | {duration(seconds * (all_new - worth) / worth)} left"

    def say(self, line: str) -> None:
        """Prints a line that stays, and what comes next under this title counts anew.

        What a model wrote in the line cannot act on the terminal.
        """
        self._start(self._title)
        if self._enabled:
            self._shown = time.monotonic()
            put(visible(line), sys.stdout)

    def _show(self, text: str) -> None:
        """Draws or prints, unless that has just been done."""
        if self.is_due():
            self._shown = time.monotonic()
            self._draw(text)

    def _draw(self, text: str) -> None:
        line = f"{self._title} {text}".lstrip()
        if self._live:  # a longer line would wrap, and its first row would stay
            put(line[: shutil.get_terminal_size().columns - 1], sys.stdout, end="")
        else:
            put(line, sys.stdout)


class Pace:
    """How long steps take, and how long the rest will take."""

    def __init__(self, steps: int) -> None:
        """The next of `steps` steps begins now."""
        self._steps, self._ends = steps, deque([time.monotonic()], maxlen=RECENT + 1)

    def after(self, step: int) -> str:
        """E.g. "1.1 s/step, 31 s left"; call this at the end of each step."""
        self._ends.append(time.monotonic())
        each = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        left = self._steps - step
        return f"{each:.1f} s/step" + (f", {duration(each * left)} left" if left else "")


def duration(seconds: float) -> str:
    """E.g. "31 s", "12 min" or "3.4 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
