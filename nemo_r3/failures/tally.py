"""`Tally`: how the first answers of a failure bank fared, and what that says about the task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nemo_r3.config import Config
from nemo_r3.errors import in_one_line
from nemo_r3.types import NO_ROOM, Attempt


@dataclass(frozen=True)
class Tally:
    """Counts of first answers."""

    asked: int = 0  # all of them
    passed: int = 0  # the verifier accepts them
    no_room: int = 0  # not sampled, because the task alone fills `rollout.max_model_len`
    truncated: int = 0  # cut at `rollout.max_answer_tokens`

    @property
    def truncated_share(self) -> float:
        """The share of answers that were cut; 0 if there are none."""
        return self.truncated / self.asked if self.asked else 0.0

    def line(self, problems: int) -> str:
        """E.g. "0 of 288 problems solved at first try"."""
        if self.asked == problems:
            return f"{self.passed} of {self.asked} problems solved at first try"
        return f"{self.passed} of {self.asked} answers to {problems} problems right at first try"

    def doubt(self) -> str:
        """A question to ask if all answers fared alike; empty if they did not."""
        if not self.asked or self.no_room == self.asked or 0 < self.passed < self.asked:
            return ""
        if self.passed:
            return "every answer passed: are they too easy, or does verify accept wrong answers?"
        return "every answer failed: are they too hard, or does verify reject right answers?"

    def why_no_failures(self, config: Config) -> str:
        """Why a bank with these answers has nothing to reflect on."""
        longest, failures = config.rollout.max_model_len, config.failures
        asked_for = f"min_solve_rate={failures.min_solve_rate:g} and max_solve_rate={failures.max_solve_rate:g}"
        counts = {
            "passed": self.passed,
            f"found no room in rollout.max_model_len={longest}": self.no_room,
            f"are left out by failures.{asked_for}": self.asked - self.passed - self.no_room,
        }
        return f"of {self.asked} first answers " + ", ".join(
            f"{count} {what}" for what, count in counts.items() if count
        )


def tally(attempts: Sequence[Attempt]) -> Tally:
    """Counts first answers."""
    return Tally(
        asked=len(attempts),
        passed=sum(attempt.passed for attempt in attempts),
        no_room=sum(attempt.answer.finish_reason == NO_ROOM for attempt in attempts),
        truncated=sum(attempt.answer.truncated for attempt in attempts),
    )


def total(tallies: Iterable[Mapping[str, int]]) -> Tally:
    """The sum of tallies, as JSON keeps them."""
    counts: Counter[str] = Counter()
    for counted in tallies:
        counts.update(counted)
    return Tally(**counts)


def show(attempt: Attempt) -> str:
    """An attempt in three lines: problem, answer, verdict."""
    return (
        f"  problem  {in_one_line(attempt.problem.text)}\n  answer   {in_one_line(attempt.answer.text)}\n"
        f"  verdict  {'passed' if attempt.passed else 'failed'}"
    )
