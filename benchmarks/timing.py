"""Seconds, taken and compared."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def times_as_long(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """Theirs over ours, which were taken in turns: of the medians, and the lowest and highest of any turn."""
    pairs = [their / our for their, our in zip(theirs, ours, strict=True)]
    return statistics.median(theirs) / statistics.median(ours), min(pairs), max(pairs)


class Stopwatch:
    """Wall and CPU seconds (all threads of this process) by name."""

    def __init__(self) -> None:
        self.wall: Counter[str] = Counter()
        self.cpu: Counter[str] = Counter()

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds what happens inside to `name`."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[name] += time.perf_counter() - wall
        self.cpu[name] += time.process_time() - cpu

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.time(name):
                return function(*args, **kwargs)

        return wrapped

    def clear(self) -> None:
        """Back to nothing."""
        self.wall.clear()
        self.cpu.clear()

    def split(self) -> dict[str, dict[str, float]]:
        """A step's times: what is neither rollout nor weight sync is the update."""
        for times in (self.wall, self.cpu):
            times["update"] = times["step"] - times["rollout"] - times["sync"]
        return {"wall": dict(self.wall), "cpu": dict(self.cpu)}
