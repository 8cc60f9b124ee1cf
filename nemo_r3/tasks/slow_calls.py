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
_calls: dict[int, tuple[float, str, str]] = {}
"""By thread, when its current call began, what runs, and on what."""


@contextmanager
def warn_if_slow(what: str, where: str) -> Iterator[None]:
    """Warns once if its block, which calls a user's function, takes longer than 10 s.

    Args:
        what: the function, such as "doubles.verify".
        where: what it works on, such as "on an answer to problem 'double-7'".
    """
    _start_watching()
    own = threading.get_ident()
    timed = own == threading.main_thread().ident  # which handles the timer's signal
    _calls[own] = time.monotonic(), what, where
    if timed:
        signal.setitimer(signal.ITIMER_VIRTUAL, _seconds, LOOK)
    try:
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _calls.pop(own, None)


@cache
def _start_watching() -> None:
    """Starts the thread, and handles the timer's signal, which would kill the process otherwise.

    The first call is the main thread's: a task tries its verifier when it is loaded.
    """
    threading.Thread(target=_watch, daemon=True).start()
    signal.signal(signal.SIGVTALRM, lambda *_: _look())


def _watch() -> None:
    while True:
        time.sleep(LOOK)
        _look()


def _look() -> None:
    global _seconds
    for thread, (began, what, where) in list(_calls.items()):
        if time.monotonic() > began + _seconds:
            seconds, _seconds = _seconds, 2 * _seconds
            _calls.pop(thread, None)
            os.write(
                2, f"warning: {what} has been working for {seconds:.0f} s {where}; the run waits for it\n".encode()
            )
