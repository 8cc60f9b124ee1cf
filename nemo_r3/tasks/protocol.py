"""`Task`: what a verifiable task is to the rest of nemo_r3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nemo_r3.types import Problem


@dataclass(frozen=True)
class Wording:
    """A task's words for its turns, by default the paper's for Countdown, if known; `dialogue.*` replaces them."""

    task: str = "{problem}"  # the first turn, with the task's {placeholders}
    reflect: str = (
        "You tried solving the problem and got the wrong answer. Reflect on what went wrong and write a short "
        "explanation that will help you do better next time."
    )
    retry: str = "Now try to solve the problem again."  # in this and `reflect`, {task} is the first turn


class Task(Protocol):
    """A source of problems and a pure, safe, binary verifier."""

    name: str
    verifier: str
    """Version of the verifier and its settings, stamped into failure banks; changes when a verdict may change."""
    wording: Wording

    def problems(self, split: str) -> Sequence[Problem]:
        """The problems of "train" or "test", always the same and in the same order; the splits share none."""
        ...

    def verify(self, problem: Problem, text: str) -> bool:
        """Whether an answer solves the problem. Pure; never evaluates `text`; never raises on any text."""
        ...
