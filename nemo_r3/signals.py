"""What ends a process from outside: a request to stop, and a hang.

    a request to stop -> noted -> a rollout is left, an update is finished -> all ranks agree -> save -> exit code 75
    a second one      -> the process ends at once; the last checkpoint stands
    no sign of life   -> a line and every thread's stack on stderr, then the end

Signals belong to the process, so what is noted is this module's own state.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType

STOPPED = 75
"""Exit code (EX_TEMPFAIL of sysexits.h) of a process that stopped on request: the same command goes on from there."""
REQUESTS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask to stop: of Slurm, kill, Ctrl-C and a terminal that is closed."""
SAME_REQUEST = 5.0
"""Seconds within which a second signal belongs to the first: Slurm may send one to the tasks and one to the script.

A second Ctrl-C is a person's, and counts at once.
"""

LOOK = 1.0
"""Seconds between two looks at the last sign of life."""

_noted: list[tuple[str, float]] = []
_watched: tuple[float, float] | None = None
"""Seconds without a sign of life that are allowed, and when the last one was; None while nobody watches."""


class Stopped(Exception):  # noqa: N818  nothing is wrong
    """All ranks agree to stop; raised on every one of them."""


def listen() -> None:
    """Notes requests to stop from now on, instead of dying of them. What nohup or a shell's & has ignored stays so."""
    for number in REQUESTS:
        if number in (signal.SIGUSR1, signal.SIGTERM) or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)


def restore_defaults() -> None:
    """Lets a request to stop kill the process again: it has nothing left to save."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_DFL)


def noted() -> str | None:
    """The signal that asked this process to stop, e.g. "SIGUSR1"; None while there was none."""
    return _noted[0][0] if _noted else None


def _note(number: int, frame: FrameType | None) -> None:
    now, name = time.monotonic(), signal.Signals(number).name
    if _noted and (now - _noted[0][1] > SAME_REQUEST or name == _noted[0][0] == "SIGINT"):
        os._exit(128 + number)
    if not _noted:
        _noted.append((name, now))
        if name == "SIGINT" and os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nstopping as soon as everything is saved; Ctrl-C again ends this at once\n")


def watch(seconds: float) -> None:
    """Starts a watchdog: without `alive` it dumps all stacks after 0.9 * seconds and kills the process after 1.1.

    In between, a hung collective fails by its own time-out, which says more. The kernel does the killing (SIGALRM),
    since a thread that hangs inside a library runs no Python.

    Args:
        seconds: of run.timeout_minutes, which the line before the stacks names.
    """
    global _watched
    _watched = (seconds, 0.0)
    alive()
    _start_announcer()


@contextmanager
def watched(seconds: float) -> Iterator[None]:
    """Watches its block alone, see `watch`."""
    global _watched
    watch(seconds)
    try:
        yield
    finally:
        _watched = None
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)


def alive() -> None:
    """A sign of life; costs nothing when called often."""
    global _watched
    now = time.monotonic()
    if _watched is None or now - _watched[1] < 1:
        return
    seconds = _watched[0]
    _watched = (seconds, now)
    faulthandler.dump_traceback_later(0.9 * seconds)
    signal.setitimer(signal.ITIMER_REAL, 1.1 * seconds)


@cache
def _start_announcer() -> None:
    threading.Thread(target=_announce, daemon=True).start()


def _announce() -> None:
    """Says just before the stacks why they come. A hang that holds Python's lock comes without this line."""
    said = 0.0
    while True:
        time.sleep(LOOK)
        seconds, last = _watched or (math.inf, 0.0)
        if last != said and time.monotonic() > last + 0.9 * seconds - 2 * LOOK:
            said = last
            line = (
                f"error: no sign of life for {0.9 * seconds:.0f} s: without one this process ends soon "
                f"(run.timeout_minutes={seconds / 60:g}); where its threads are, the innermost call first:\n"
            )
            os.write(2, line.encode())
