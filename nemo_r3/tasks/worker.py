"""`Worker`: calls a function in a process of its own, within limits of time and memory.

For verifiers whose libraries may hang or fill the memory on what a model wrote, such as sympy: a signal or a thread can
stop Python only between two of its instructions, but a process can always be killed.

    Worker("module:function")(*arguments)   --JSON line-->   python -m nemo_r3.tasks.worker module:function
                                            <--JSON line--
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

from nemo_r3.errors import UserError, describe
from nemo_r3.progress import warn

START_SECONDS = 120.0


class Worker:
    """Calls a function in another process, which starts with the first call, and again after it was killed.

    Every thread that calls has a process of its own. That has a session of its own, so that what the function starts is
    killed with it, and Ctrl-C reaches neither.

    Example: ``Worker("nemo_r3.tasks.latex.comparison:compare", seconds=2)(r"\\frac{1}{2}", "0.5")``

    Args:
        function: "module:function"; what it takes and returns must be JSON.
        seconds: of wall time for a call.
        megabytes: of address space for the process.
    """

    def __init__(self, function: str, seconds: float = 5.0, megabytes: int = 2048) -> None:
        self._function, self._seconds, self._megabytes = function, seconds, megabytes
        self._own = threading.local()  # this thread's process
        self._first_end = threading.Lock()  # whoever takes it, and never gives it back, warns

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns, or None if it ran out of time or memory or ended its process.

        The first such end is warned of.

        Raises:
            UserError: the function raised, or returned what JSON cannot write, or its module cannot be imported.
        """
        process = self._started()
        assert process.stdin is not None
        process.stdin.write(json.dumps(arguments) + "\n")
        process.stdin.flush()
        reply = self._reply(process, self._seconds)
        if reply is None:
            self._warn_once(process)
            self._end(process)
            return None
        if "raised" in reply:
            raise UserError(f"{self._function} raised {reply['raised']}")
        return reply["returned"]

    def _started(self) -> subprocess.Popen[str]:
        process: subprocess.Popen[str] | None = getattr(self._own, "process", None)
        if process is None or process.poll() is not None:
            path = os.pathsep.join(place or os.getcwd() for place in sys.path)
            self._own.process = process = subprocess.Popen(
                [sys.executable, "-m", __name__, self._function, str(self._megabytes), str(self._seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
            if self._reply(process, START_SECONDS) is None:
                self._end(process)
                raise UserError(f"{self._function} cannot be imported in a process of its own, see the error above")
        return process

    @staticmethod
    def _reply(process: subprocess.Popen[str], seconds: float) -> dict[str, Any] | None:
        """The next line of a process; None when none comes in time, or the process has ended."""
        assert process.stdout is not None
        poll = select.poll()  # select.select would refuse file numbers above 1023
        poll.register(process.stdout, select.POLLIN)
        line = process.stdout.readline() if poll.poll(1000 * seconds) else ""
        reply: dict[str, Any] | None = json.loads(line) if line else None
        return reply

    def _warn_once(self, process: subprocess.Popen[str]) -> None:
        if self._first_end.acquire(blocking=False):
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)  # its pipe closes just before it ends
            ended = f"ran out of {self._megabytes} MiB or ended its process (exit code {process.returncode})"
            why = f"took longer than {self._seconds:g} s" if process.returncode is None else ended
            warn(f"{self._function} {why}: a call gives None then; more such calls are not warned of")

    def _end(self, process: subprocess.Popen[str]) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # of a call that it has not read
                pipe.close()
        self._own.process = None


def serve(function: str, megabytes: int, seconds: float) -> None:
    """Answers calls, a JSON line each, until standard input ends; what the function prints goes to standard error.

    The function's own standard input is empty. A copy of this process that it forks does not answer, and a call whose
    caller has died ends by itself.
    """
    server = os.getpid()
    calls, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    limit = megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print("{}", file=answers, flush=True)
    for line in calls:
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
        try:
            reply = json.dumps({"returned": call(*json.loads(line))})
        except MemoryError:
            return
        except Exception as error:  # the caller hears of any
            reply = json.dumps({"raised": describe(error)})
        if os.getpid() != server:
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
