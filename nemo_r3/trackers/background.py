"""`InBackground`: a server that a thread sends to, so that a slow or lost one neither delays nor ends a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread

from nemo_r3.errors import describe
from nemo_r3.files import read_json_object, write_whole
from nemo_r3.progress import put, warn
from nemo_r3.trackers.tracker import Metrics, Server

RETRY_SECONDS = 60.0
"""How long a server that failed is left alone."""
END_SECONDS = 30.0
"""How long a process that has done its work waits for a server, which gets an evaluation's results only then."""
STOP_SECONDS = 10.0
"""How long one that stops or fails waits: Slurm kills a job 30 seconds after it was told to end."""
SILENT_SECONDS = 2.0
"""A longer wait is announced."""


class InBackground:
    """A server that a thread makes and sends to, in order. What fails is tried again; a warning says so once.

    Args:
        setting: that asks for it; warnings begin with this.
        place: the project or experiment there.
        file: keeps the run's id in that place, and the last step sent; it gets none up to that again.
        make: makes it, given the id that an earlier process kept.
    """

    def __init__(self, setting: str, place: str, file: Path, make: Callable[[str | None], Server]) -> None:
        self._setting, self._place, self._file, self._make = setting, place, file, make
        self._sent, self._warned, self._ending = 0, False, Event()
        self._acts: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._acts.put(self._begin)
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """See `Tracker`; returns at once."""
        self._acts.put(lambda: self._log(step, metrics))

    def summarise(self, results: Metrics) -> None:
        """See `Server`; returns at once."""
        self._acts.put(lambda: self._server.summarise(results))

    def close(self, code: int) -> None:
        """See `Tracker`; waits for what is not sent yet, `END_SECONDS` or `STOP_SECONDS` at most."""
        self._acts.put(lambda: self._server.close(code))
        self._acts.put(None)
        self._ending.set()
        self._thread.join(SILENT_SECONDS)
        if self._thread.is_alive():
            longest = STOP_SECONDS if code else END_SECONDS
            put(f"{self._setting}: waiting up to {longest:.0f} s for what is not sent yet", sys.stderr)
            self._thread.join(longest)
        if self._thread.is_alive() or not self._acts.empty():
            self._warn("not everything was sent; the same command, run again, sends what is missing")

    def _work(self) -> None:
        while (act := self._acts.get()) is not None:
            while not self._done(act):
                if self._ending.is_set():
                    return
                self._ending.wait(RETRY_SECONDS)

    def _done(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except Exception as error:  # noqa: BLE001  a server must not end a run
            if not self._warned and not self._ending.is_set():
                self._warn(f"{describe(error)}; the run goes on, and tries again every {RETRY_SECONDS:.0f} s")
            self._warned = True
            return False
        return True

    def _begin(self) -> None:
        kept = read_json_object(self._file, self._setting) if self._file.exists() else {}
        if kept.get("place") != self._place:  # the setting was changed: it gets the whole run
            kept = {}
        self._server = self._make(kept.get("run_id"))
        self._file.parent.mkdir(exist_ok=True)
        self._keep(kept.get("step", 0))

    def _log(self, step: int, metrics: Metrics) -> None:
        if step > self._sent:
            self._server.log(step, metrics)
            self._keep(step)

    def _keep(self, step: int) -> None:
        self._sent = step
        sent = {"place": self._place, "run_id": self._server.run_id, "step": step}
        write_whole(self._file, json.dumps(sent))

    def _warn(self, message: str) -> None:
        warn(f"{self._setting}: {message}")
