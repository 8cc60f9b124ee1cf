"""A watchdog for hangs: without a sign of life, a line and every thread's stack on stderr, then the process's end.

The timer that ends it belongs to the process, so this module keeps state of its own.
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

LOOK = 1.0
"""Seconds between two looks at the last sign of life."""

_watched: tuple[float, float] | None = None
"""How many seconds without a sign of life are allowed, and when the last one was; None while nothing is watched."""


def watch(seconds: float) -> None:
    """Starts a watchdog: without `alive`, it dumps all stacks after 0.9 * seconds and kills the process after 1.1.

    In between, a hung collective fails by its own time-out, which says more. The kernel does the killing (SIGALRM),
    because a thread that hangs inside a library runs no Python.
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
