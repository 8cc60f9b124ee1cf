"""`user_code`: runs part of a user's task module, and turns what it raises into one line that names the place."""

from __future__ import annotations

import importlib
import signal
import traceback
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

from nemo_r3.errors import UserError, describe

NOT_THE_USERS = (str(Path(__file__).parents[1]) + "/", str(Path(importlib.__file__).parent) + "/", "<frozen ")
"""Prefixes of the files of nemo_r3 and of Python's import: the first frame outside them is in the user's module."""
OURS = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1),  # `nemo_r3.signals`
    *(signal.SIGALRM, signal.SIGVTALRM),  # `nemo_r3.watchdog`, `nemo_r3.tasks.slow_calls`
)
"""Signals that mean something to a run: with another handler it could not be stopped, or a hang would not end it."""


@contextmanager
def user_code(what: str, remedy: str) -> Iterator[None]:
    """Runs its block, which calls a user's module, and restores working directory, signal handlers and alarm.

    Args:
        what: the part that runs, such as "doubles.verify".
        remedy: ends the message.

    Raises:
        UserError: the block raised, be it what `except Exception` misses, such as SystemExit or asyncio's
            CancelledError; a UserError of its own says enough and stays as it is.
    """
    try:
        with chdir("."), _same_signals():
            yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError(f"task.name: {what} raised {describe(error)}{_place(error)}{remedy}") from error


@contextmanager
def _same_signals() -> Iterator[None]:
    """Restores what a time limit made of `signal.alarm` leaves behind: another handler, and no timer."""
    handlers = {number: signal.getsignal(number) for number in OURS}
    seconds, _ = signal.getitimer(signal.ITIMER_REAL)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) != handler:  # None: not one of Python's
                signal.signal(number, handler)
        if seconds and not signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.setitimer(signal.ITIMER_REAL, seconds)


def _place(error: BaseException) -> str:
    """Where the error is: in the module that nemo_r3 called, and beyond; empty where the call itself failed."""
    if isinstance(error, SyntaxError):
        return f" in {error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(NOT_THE_USERS)]
    if not frames:
        return ""
    *_, theirs = (frame for frame in frames if frame.filename == frames[0].filename)
    beyond = "" if frames[-1] is theirs else f" (at {frames[-1].filename}:{frames[-1].lineno})"
    return f" in {theirs.filename}:{theirs.lineno}{beyond}"
