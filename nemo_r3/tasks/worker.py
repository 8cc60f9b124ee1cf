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
import subprocess
import sys
from typing import Any

from nemo_r3.errors import UserError, describe

START_SECONDS = 120.0


class Worker:
    """Calls a function in another process, which starts with the first call, and again after it was killed.

    Example: ``Worker("nemo_r3.tasks.latex.comparison:compare", seconds=2)(r"\\frac{1}{2}", "0.5")``

    Args:
        function: "module:function"; what it takes and returns must be JSON.
        seconds: of wall time for a call.
        megabytes: of address space for the process.
    """

    def __init__(self, function: str, seconds: float = 5.0, megabytes: int = 2048) -> None:
        self._function, self._seconds, self._megabytes = function, seconds, megabytes
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns, or None if it ran out of time or memory.

        Raises:
            UserError: the function raised, or its module cannot be imported.
        """
        process = self._started()
        assert process.stdin is not None
        process.stdin.write(json.dumps(arguments) + "\n")
        process.stdin.flush()
        reply = self._reply(process, self._seconds)
        if reply is None:
            self._end()
            return None
        if "raised" in reply:
            raise UserError(f"{self._function} raised {reply['raised']}")
        return reply["returned"]

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            path = os.pathsep.join(place or os.getcwd() for place in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, self._function, str(self._megabytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )
            if self._reply(self._process, START_SECONDS) is None:
                self._end()
                raise UserError(f"{self._function} cannot be imported in a process of its own, see the error above")
        return self._process

    @staticmethod
    def _reply(process: subprocess.Popen[str], seconds: float) -> dict[str, Any] | None:
        """The next line of a process; None when none comes in time, or the process has ended."""
        assert process.stdout is not None
        poll = select.poll()  # select.select would refuse file numbers above 1023
        poll.register(process.stdout, select.POLLIN)
        line = process.stdout.readline() if poll.poll(1000 * seconds) else ""
        reply: dict[str, Any] | None = json.loads(line) if line else None
        return reply

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def serve(function: str, megabytes: int) -> None:
    """Answers calls, a JSON line each, until standard input ends; what the function prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    limit = megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        try:
            reply = {"returned": call(*json.loads(line))}
        except MemoryError:
            return
        except Exception as error:  # the caller hears of any
            reply = {"raised": describe(error)}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
