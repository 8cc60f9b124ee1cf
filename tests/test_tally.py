"""How first answers fared, in words."""

from __future__ import annotations

import pytest

from nemo_r3.failures.tally import Tally, show
from nemo_r3.types import Answer, Attempt, Phase, Problem, Segment, Trajectory

FAILED, PASSED = "every answer failed: are they too hard,", "every answer passed: are they too easy,"


@pytest.mark.parametrize(
    ("tally", "line", "doubt"),
    [
        (Tally(288, 0), "0 of 288 problems solved at first try", f"{FAILED} or does verify reject right answers?"),
        (Tally(288, 288), "288 of 288 problems solved", f"{PASSED} or does verify accept wrong answers?"),
        (Tally(576, 3), "3 of 576 answers to 288 problems right at first try", ""),
        (Tally(288, 0, 288), "0 of 288 problems solved at first try", ""),
    ],
)
def test_a_tally_in_words(tally: Tally, line: str, doubt: str) -> None:
    assert tally.line(288).startswith(line) and tally.doubt() == doubt


def test_an_example_is_a_problem_with_its_answer_and_verdict() -> None:
    problem, answer = Problem("p0", "problem 0", {}), Answer(Segment(Phase.ATTEMPT, (7, 8, 2)), "7 8", "stop")
    said = show(Attempt(problem, 0, Trajectory(()), answer, False))
    assert said.split() == "problem problem 0 answer 7 8 verdict failed".split()
