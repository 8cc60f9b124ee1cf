"""`warn_if_slow`: warns on standard error while a call of a user's function takes long.

A thread looks at the clock. It cannot while the call holds Python's lock, as a regular expression that backtracks
endlessly does; but such a call uses the processor, so the kernel's timer of processor time interrupts it for a look.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

LOOK = 1.0
"""Seconds between two looks at the call under way."""

_seconds = 10.0
"""How long a call may take before a warning; doubles each time, so that a slow verifier is warned of only rarely."""
_call: tuple[float, str, str] | None = None
"""When the current call began, what runs, and on what."""


@contextmanager
def warn_if_slow(what: str, where: str) -> Iterator[None]:
    """Warns once if its block, which calls a user's function, takes longer than 10 s.

    Args:
        what: the function, such as "doubles.verify".
        where: what it works on, such as "on an answer to problem 'double-7'".
    """
    global _call
    timed = _start_watching()
    _call = (time.monotonic(), what, where)
    if timed:
        signal.setitimer(signal.ITIMER_VIRTUAL, _seconds, LOOK)
    try:
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _call = None


@cache
def _start_watching() -> bool:
    """Starts the thread; returns whether the timer's signal is handled, since it would kill the process otherwise."""
    threading.Thread(target=_watch, daemon=True).start()
    if threading.current_thread() is not threading.main_thread():
        return False
    signal.signal(signal.SIGVTALRM, lambda *_: _look())
    return True


def _watch() -> None:
    while True:
        time.sleep(LOOK)
        _look()


def _look() -> None:
    global _seconds, _call
    call = _call
    if call is None or time.monotonic() < call[0] + _seconds:
        return
    _, what, where = call
    seconds, _seconds, _call = _seconds, 2 * _seconds, None
    os.write(2, f"warning: {what} has been working for {seconds:.0f} s {where}; the run waits for it\n".encode())
