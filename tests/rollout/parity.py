"""The task of the probe."""

from nemo_r3.tasks.protocol import Wording
from nemo_r3.types import Problem


class Parity:
    """A task that any model solves half the time."""

    name = "parity"
    verifier = "parity-1"
    wording = Wording("{text}", "What went wrong?", "Try again.")

    def problems(self, split: str) -> list[Problem]:
        return [Problem(f"p{i}", f"say {'one two three ' * (1 + 3 * (i % 3))}{i}", {}) for i in range(5)]

    def verify(self, problem: Problem, text: str) -> bool:
        return len(text) % 2 == 0
