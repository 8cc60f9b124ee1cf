"""`Tally`: how the first answers of a failure bank fared, and what that says about the task, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from nemo_r3.config import Config
from nemo_r3.errors import in_one_line
from nemo_r3.types import NO_ROOM, Attempt


@dataclass(frozen=True)
class Tally:
    """Counts of first answers.

    Attributes:
        asked: all of them.
        passed: the verifier accepts them.
        no_room: not sampled, because the task alone fills `rollout.max_model_len`.
        truncated: cut at `rollout.max_answer_tokens`.
    """

    asked: int = 0
    passed: int = 0
    no_room: int = 0
    truncated: int = 0

    @property
    def truncated_share(self) -> float:
        """Of all; 0 where there are none."""
        return self.truncated / self.asked if self.asked else 0.0

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
        if not self.asked:
            return "how its first answers fared is not recorded"
        return f"of {self.asked} first answers " + ", ".join(
            f"{count} {what}" for what, count in counts.items() if count
        )


def tally(attempts: Iterable[Attempt]) -> Tally:
    """Counts first answers."""
    found = list(attempts)
    return Tally(
        asked=len(found),
        passed=sum(attempt.passed for attempt in found),
        no_room=sum(attempt.answer.finish_reason == NO_ROOM for attempt in found),
        truncated=sum(attempt.answer.truncated for attempt in found),
    )


def total(counts: Iterable[Mapping[str, int]]) -> Tally:
    """The sum of tallies, each as the mapping that JSON keeps of it."""
    found = [Tally(**count) for count in counts]
    return Tally(*(sum(getattr(one, field.name) for one in found) for field in fields(Tally)))


def written(attempt: Attempt) -> str:
    """An attempt in a line each for problem, answer and verdict."""
    return (
        f"  problem  {in_one_line(attempt.problem.text)}\n  answer   {in_one_line(attempt.answer.text)}\n"
        f"  verdict  {'passed' if attempt.passed else 'failed'}"
    )
