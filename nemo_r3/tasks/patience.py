"""`said_if_slow`: a call of a user's function that takes long is named on standard error while it goes on.

A thread looks at the clock. It cannot while a call keeps Python's lock, as a regular expression does that backtracks
without end: such a call uses the processor, and then the kernel's timer of processor time interrupts it for the look.
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
"""How long a call may take before it is named; doubles each time: a verifier that is always slow is named seldom."""
_call: tuple[float, str, str] | None = None
"""When the call under way began, what works, and on what."""


@contextmanager
def said_if_slow(what: str, where: str) -> Iterator[None]:
    """Runs its block, which calls a user's function, and says once if that has been working for 10 s.

    Args:
        what: the function, such as "doubles.verify".
        where: what it works on, as in "on an answer to problem 'double-7'".
    """
    global _call
    timed = _start_looking()
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
def _start_looking() -> bool:
    """Starts the thread; whether the timer may be set, which would end a process that does not handle its signal."""
    threading.Thread(target=_look_again_and_again, daemon=True).start()
    if threading.current_thread() is not threading.main_thread():
        return False
    signal.signal(signal.SIGVTALRM, lambda *_: _look())
    return True


def _look_again_and_again() -> None:
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
