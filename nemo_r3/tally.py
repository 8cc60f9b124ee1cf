"""`Tally`: how the first answers of a failure bank fared, and what that says about the task, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nemo_r3.config import Config
from nemo_r3.errors import in_one_line
from nemo_r3.rollout.scheduler import NO_ROOM, Attempted


@dataclass(frozen=True)
class Tally:
    """Counts of first answers.

    Attributes:
        asked: all of them.
        passed: the verifier accepts them.
        no_room: not sampled, because the task alone fills `rollout.max_model_len`.
    """

    asked: int = 0
    passed: int = 0
    no_room: int = 0

    def line(self, problems: int) -> str:
        """E.g. "0 of 288 problems solved at first try"."""
        what = "problems" if self.asked == problems else f"answers to {problems} problems"
        return f"{self.passed} of {self.asked} {what} {'solved' if what == 'problems' else 'right'} at first try"

    def doubt(self) -> str:
        """What to ask oneself where all answers fared alike; empty where they did not."""
        if not self.asked or self.no_room == self.asked or 0 < self.passed < self.asked:
            return ""
        if self.passed:
            return "every answer passed: does verify refuse a wrong one?"
        return "every answer failed: does verify accept a right one?"

    def why_no_failures(self, config: Config) -> str:
        """Why a bank with these answers has nothing to reflect on; a bank of an older nemo_r3 has not counted them."""
        longest, most = config.rollout.max_model_len, config.failures.max_solve_rate
        counts = {
            "passed": self.passed,
            f"found no room in rollout.max_model_len={longest}": self.no_room,
            f"are left out by failures.max_solve_rate={most:g}": self.asked - self.passed - self.no_room,
        }
        parts = [f"{count} {what}" for what, count in counts.items() if count]
        return f"of {self.asked} first answers {', '.join(parts) or 'none is known'}"


def tally(attempts: Iterable[Attempted]) -> Tally:
    """Counts first answers."""
    found = list(attempts)
    no_room = sum(attempt.answer.finish_reason == NO_ROOM for attempt in found)
    return Tally(len(found), sum(attempt.passed for attempt in found), no_room)


def total(counts: Iterable[Mapping[str, int]]) -> Tally:
    """The sum of tallies, each as the mapping that JSON keeps of it."""
    found = [Tally(**count) for count in counts]
    return Tally(*(sum(getattr(one, name) for one in found) for name in ("asked", "passed", "no_room")))


def example(attempts: Sequence[Attempted]) -> str:
    """The first attempt, in a line each for problem, answer and verdict; empty where there is none."""
    return "".join(
        f"  problem  {in_one_line(it.problem.text)}\n  answer   {in_one_line(it.answer.text)}\n"
        f"  verdict  {'passed' if it.passed else 'failed'}"
        for it in attempts[:1]
    )
