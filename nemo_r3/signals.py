"""Requests to stop.

    the first one -> noted -> a rollout is left, an update is finished -> all ranks agree -> save -> exit code 75
    a second one  -> the process ends at once; the last checkpoint stands

Signals belong to the process, so this module keeps state of its own.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from types import FrameType

STOPPED = 75
"""Exit code (EX_TEMPFAIL of sysexits.h) of a process that stopped on request; the same command continues."""
REQUESTS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask to stop: from Slurm, kill, Ctrl-C and a terminal that closes."""
SAME_REQUEST = 5.0
"""Seconds within which a second signal is the same request: Slurm may send one to the tasks and one to the script.

A second Ctrl-C counts at once.
"""

_noted: list[tuple[str, float]] = []


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


def note(name: str) -> None:
    """Notes a request to stop, unless there is one."""
    if not _noted:
        _noted.append((name, time.monotonic()))


def noted() -> str | None:
    """What asked this process to stop, e.g. "SIGUSR1"; None if nothing did."""
    return _noted[0][0] if _noted else None


def _note(number: int, frame: FrameType | None) -> None:
    now, name = time.monotonic(), signal.Signals(number).name
    if _noted and (now - _noted[0][1] > SAME_REQUEST or name == _noted[0][0] == "SIGINT"):
        os._exit(128 + number)
    if not _noted:
        note(name)
        if name == "SIGINT" and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # nobody reads that any more
                os.write(2, b"\nstopping as soon as everything is saved; Ctrl-C again ends this at once\n")
