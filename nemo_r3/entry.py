"""How a recipe's process begins and ends: arguments, and errors as messages and exit codes."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from nemo_r3 import signals, trackers
from nemo_r3.config.load import USAGE
from nemo_r3.errors import UserError
from nemo_r3.progress import put

USER_ERROR = 2
"""Exit code of a process that ended with an error that the user can fix."""
UNREAD = 128 + signal.SIGPIPE
"""Exit code of a process whose standard output nobody reads any more: a shell's for other tools, which it kills."""
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
)
"""Errors of files and directories that a user can fix."""


def main(recipe: Callable[[Sequence[str]], None], usage: str = USAGE) -> None:
    """Runs a recipe with the command line's arguments. A `UserError` becomes one line and exit code 2; a stop, code 75.

    --help shows the docstring of the recipe's module and `usage`.

    Every failure leaves through os._exit: at shutdown, Python would run vLLM's exit hooks, which wait for ranks that
    are themselves waiting in a collective.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # `recipes` set it for the time of its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout is None:  # closed, by >&-
        sys.stdout = Path(os.devnull).open("w")
    sys.stderr = sys.stderr or sys.stdout
    if isinstance(sys.stdout, io.TextIOWrapper):  # like standard error: a locale may lack what a text or table has
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if sys.argv[1:2] in (["--help"], ["-h"]):
            print(f"{sys.modules[recipe.__module__].__doc__}\n{usage}")
        else:
            recipe(sys.argv[1:])
        trackers.close(0)
        sys.stdout.flush()
    except UserError as error:
        _leave(f"error: {error}", USER_ERROR)
    except signals.Stopped as error:
        _leave(f"{error}; run the same command again: training and mining go on from what is saved", signals.STOPPED)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except Exception as error:  # noqa: BLE001  the last frame of the process
        if isinstance(error, BrokenPipeError) and _is_unread():
            trackers.close(UNREAD)
            os._exit(UNREAD)
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            where = error.filename or "writing failed"
            _leave(f"error: {where}: {error.strerror}; fix that and run the same command again", USER_ERROR)
        if "torch" in sys.modules:  # recipes.plan and recipes.report do without
            from nemo_r3.runtime import is_collective

            if is_collective(error):
                _leave(f"error: {_of_another_rank(error)}", 1, follows=True)
        _leave(traceback.format_exc(), 1)


def _is_unread() -> bool:
    """Whether standard output is a pipe whose reader is gone."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _of_another_rank(error: Exception) -> str:
    """The message for a failed collective, whose cause is in another rank's log, not in this one's stack."""
    first_line = str(error).partition("\n")[0]
    if "connectFullMesh" in first_line:
        message = (
            "the ranks cannot connect to each other: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network "
            "interface that the nodes share, under Slurm in cluster.setup"
        )
    elif "timed out" in first_line.lower() or "timeout" in first_line.lower():
        message = "a collective waited for another rank until run.timeout_minutes; the stacks of all ranks say why"
    else:
        message = "another rank has ended, which ends this one; that one's message says why"
    return f"{message} ({first_line})"


def _leave(message: str, code: int, follows: bool = False) -> None:
    rank = os.environ.get("RANK", "0")  # may be no number, which is then what the message says
    leads = rank == "0"
    if follows or not (leads or code == signals.STOPPED):
        signals.restore_defaults()
        time.sleep(3)  # the rank with the cause speaks first; rank 0 speaks for all, and ends them
    if not leads:
        message = f"[rank {rank}] {message}"
    with suppress(OSError):
        sys.stdout.flush()
    if leads or code != signals.STOPPED:  # all ranks stop together, and one says so
        with suppress(OSError):
            put(message, sys.stderr)
    trackers.close(code)
    os._exit(code)
