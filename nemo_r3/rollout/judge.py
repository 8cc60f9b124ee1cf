"""`Judge`: asks the task's verifier, while the engine waits or, with `task.verifier_threads`, beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from nemo_r3 import signals, watchdog
from nemo_r3.errors import UserError
from nemo_r3.tasks.protocol import Task
from nemo_r3.types import NO_ROOM, Answer, Problem

LOOK = 0.5
"""Seconds between two looks for a signal while a verdict is waited for: hundreds of calls may be before it."""


class Judge:
    """This rank's calls of a task's verifier.

    Attributes:
        seconds: how long this rank has waited for verdicts; whoever reads it may set it back.
        failure: the verifier's first error. It is not asked again then, and what its verdicts are worth is up to
            whoever looks here.
    """

    def __init__(self, task: Task, threads: int) -> None:
        """Asks in as many threads; in none, while the caller waits."""
        self.seconds = 0.0
        self.failure: UserError | None = None
        self._task = task
        self._threads = ThreadPoolExecutor(threads, "verifier") if threads else None

    def ask(self, problem: Problem, answer: Answer, wanted: bool = True) -> Future[bool]:
        """Asks whether an answer solves a problem; if that is not wanted, or it had no room, the verdict is False."""
        asks = wanted and answer.finish_reason != NO_ROOM
        if asks and self._threads is not None:
            return self._threads.submit(self._verify, problem, answer)
        asked: Future[bool] = Future()
        with self._waiting():
            asked.set_result(asks and self._verify(problem, answer))
        return asked

    def verdict(self, asked: Future[bool]) -> bool:
        """Waits for a verdict; once a signal asks to stop, what is not known is False, and of no use."""
        with self._waiting():
            while not asked.done() and signals.noted() is None:
                wait([asked], LOOK)
        return asked.done() and asked.result()

    def _verify(self, problem: Problem, answer: Answer) -> bool:
        if self.failure is not None:
            return False
        try:
            return self._task.verify(problem, answer.text)
        except UserError as error:
            self.failure = self.failure or error
            return False

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds += time.monotonic() - began
        watchdog.alive()
