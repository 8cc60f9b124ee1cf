"""A side of a comparison as a process that waits for work, so that the sides can take turns.

    orchestrator --"step 3"--> stdin | stdout --one line of JSON--> orchestrator

One process runs at a time; the others wait in `readline` and cost nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Channel:
    """Commands in, answers out. Whatever else a library prints to stdout goes to stderr."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def next_command(self) -> list[str]:
        """Waits for a command; its words, or none when there will be no more."""
        return sys.stdin.readline().split()

    def answer(self, **values: Any) -> None:
        """One line of JSON."""
        print(json.dumps(values), file=self._answers, flush=True)


class Bench(Protocol):
    """What a side can be asked for."""

    def step(self, number: int) -> dict[str, Any]:
        """One step with its times."""
        ...

    def loss(self, weights: Path) -> dict[str, Any]:
        """Loss, gradient norm and KL of a given batch."""
        ...


def serve(start: Callable[[], Bench]) -> None:
    """Starts a bench and answers commands until there are no more."""
    channel = Channel()
    bench = start()
    channel.answer(ready=True)
    while command := channel.next_command():
        verb, argument = command
        channel.answer(**(bench.step(int(argument)) if verb == "step" else bench.loss(Path(argument))))
