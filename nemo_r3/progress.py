"""What a person sees while a run works: one live line on a terminal, one line per phase elsewhere."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts and rates of the phases under way, on rank 0.

    On a terminal the line is redrawn ten times a second at most; in a log file only `say` prints.
    """

    def __init__(self, enabled: bool) -> None:
        """Prints nothing where `enabled` is False (ranks other than 0)."""
        self._enabled = enabled
        self._live = enabled and sys.stdout.isatty()
        self._counts: dict[str, tuple[int, int, int]] = {}
        self._begun = self._drawn = time.monotonic()
        self._title = ""

    def begin(self, title: str) -> None:
        """Starts a new live line, e.g. "step 3/40"."""
        self._title, self._counts = title, {}
        self._begun = time.monotonic()

    def __call__(self, phase: str, done: int, total: int, tokens: int) -> None:
        """Redraws: `done` of `total` turns of `phase` have ended, with `tokens` tokens sampled."""
        self._counts[phase] = (done, total, tokens)
        now = time.monotonic()
        if self._live and now - self._drawn > 0.1:
            self._drawn = now
            self._draw(self.rates())

    def during(self, phase: str) -> None:
        """Names a phase without counts (update, refit, save) on the live line."""
        if self._live:
            self._draw(f"{self.rates()} | {phase} ..." if self._counts else f"{phase} ...")

    def rates(self) -> str:
        """E.g. "reflection 120/256, retry 98/256 | 2,310 tok/s"."""
        seconds = max(time.monotonic() - self._begun, 1e-3)
        turns = ", ".join(f"{phase} {done}/{total}" for phase, (done, total, _) in self._counts.items())
        tokens = sum(tokens for _, _, tokens in self._counts.values())
        return f"{turns} | {tokens / seconds:,.0f} tok/s"

    def say(self, line: str) -> None:
        """Prints a line that stays, in place of the live one."""
        if self._enabled:
            print(f"\r\033[K{line}" if self._live else line, flush=True)

    def _draw(self, text: str) -> None:
        sys.stdout.write(f"\r\033[K{self._title} {text}"[:160])
        sys.stdout.flush()
