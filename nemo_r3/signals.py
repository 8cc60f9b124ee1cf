"""Requests to stop, and a watchdog for hangs.

    a request to stop -> noted -> a rollout is left, an update is finished -> all ranks agree -> save -> exit code 75
    a second one      -> the process ends at once; the last checkpoint stands
    no sign of life   -> a line and every thread's stack on stderr, then the end

Signals belong to the process, so this module keeps state of its own.
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
"""Exit code (EX_TEMPFAIL of sysexits.h) of a process that stopped on request; the same command continues."""
REQUESTS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask to stop: from Slurm, kill, Ctrl-C and a terminal that closes."""
SAME_REQUEST = 5.0
"""Seconds within which a second signal is the same request: Slurm may send one to the tasks and one to the script.

A second Ctrl-C counts at once.
"""

LOOK = 1.0
"""Seconds between two looks at the last sign of life."""

_noted: list[tuple[str, float]] = []
_watched: tuple[float, float] | None = None
"""How many seconds without a sign of life are allowed, and when the last one was; None while nothing is watched."""


class Stopped(Exception):  # noqa: N818  nothing is wrong
    """All ranks agree to stop; raised on every one of them."""


def listen() -> None:
    """Notes requests to stop from now on instead of dying of them. What nohup or a shell's & ignores stays ignored."""
    for number in REQUESTS:
        if number in (signal.SIGUSR1, signal.SIGTERM) or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)


def restore_defaults() -> None:
    """Lets a request to stop kill the process again, when it has nothing left to save."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_DFL)


def noted() -> str | None:
    """The signal that asked this process to stop, e.g. "SIGUSR1"; None if there was none."""
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
    """Starts a watchdog: without `alive`, it dumps all stacks after 0.9 * seconds and kills the process after 1.1.

    In between, a hung collective fails by its own time-out, which says more. The kernel does the killing (SIGALRM),
    because a thread that hangs inside a library runs no Python.

    Args:
        seconds: `run.timeout_minutes` in seconds.
    """
    global _watched
    _watched = (seconds, 0.0)
    alive()
    _start_announcer()


@contextmanager
def watched(seconds: float) -> Iterator[None]:
    """Watches its block only, see `watch`."""
    global _watched
    watch(seconds)
    try:
        yield
    finally:
        _watched = None
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)


def alive() -> None:
    """Gives a sign of life; cheap enough to call often."""
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
    """Explains the stacks just before they come; cannot if the hang holds Python's lock."""
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
