from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from nemo_r3.evaluate import as_json, failures_of, measure, rate
from nemo_r3.rollout.scheduler import Attempted
from nemo_r3.types import Answer, Failure, Group, Phase, Problem, Reflection, Segment, Trajectory


def answer(phase: Phase) -> Answer:
    return Answer(Segment(phase, (1,), (-1.0,), 0), "x", "stop")


@dataclass(frozen=True)
class Model:
    """Fails at problems whose number is a multiple of (one when sampled, one when greedy), at either try."""

    first: tuple[int, int]
    second: tuple[int, int]

    def first_attempts(
        self, problems: Sequence[Problem], step: int, samples: int = 1, greedy: bool = False
    ) -> list[Attempted]:
        first = answer(Phase.ATTEMPT)
        context = Trajectory((Segment(Phase.TASK, (1,)), first.segment))
        return [Attempted(problem, 0, context, first, int(problem.id) % self.first[greedy] > 0) for problem in problems]

    def reflect_and_retry(
        self, failures: Sequence[Failure], step: int, group_size: int, greedy: bool = False
    ) -> list[Group]:
        turns, fails = (answer(Phase.REFLECTION), answer(Phase.RETRY)), self.second[greedy]
        return [
            Group(failure, (Reflection(0, failure.context, *turns, float(int(failure.problem.id) % fails > 0)),))
            for failure in failures
        ]


def test_the_second_try_is_measured_on_the_same_failures_before_and_after() -> None:
    problems = [Problem(str(i), "", {}) for i in range(60)]
    before, fixed = measure(Model(first=(2, 3), second=(6, 4)), problems)
    assert [int(failure.problem.id) for failure in fixed] == list(range(0, 60, 2)), "the sampled ones"
    assert before == {
        "first_try": {"sampled": rate(30, 60), "greedy": rate(40, 60)},
        "retry_success_fixed": {"sampled": rate(20, 30), "greedy": rate(15, 30)},
        "within_two": {"sampled": rate(50, 60), "greedy": rate(55, 60)},
    }
    after, own = measure(Model(first=(5, 10), second=(20, 30)), problems, fixed)
    assert [int(failure.problem.id) for failure in own] == list(range(0, 60, 5))
    assert after == {
        "first_try": {"sampled": rate(48, 60), "greedy": rate(54, 60)},
        "retry_success_fixed": {"sampled": rate(27, 30), "greedy": rate(28, 30)},
        "within_two": {"sampled": rate(57, 60), "greedy": rate(58, 60)},
    }


def test_an_attempt_without_tokens_is_no_failure_to_reflect_on() -> None:
    (attempt,) = Model(first=(1, 1), second=(1, 1)).first_attempts([Problem("0", "", {})], 0)
    empty = replace(attempt, answer=Answer(Segment(Phase.ATTEMPT, (), (), 0), "", "no_room"))
    assert failures_of([attempt, empty, replace(attempt, passed=True)]) == [attempt.failure]


def test_the_interval_is_wilsons() -> None:
    found = rate(8, 10)
    assert (found.low, found.high) == (0.4902, 0.9433)  # as statsmodels' proportion_confint(8, 10, method="wilson")


@pytest.mark.parametrize(("passed", "n"), [(0, 20), (20, 20)])
def test_the_interval_stays_inside_0_and_1(passed: int, n: int) -> None:
    found = rate(passed, n)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    assert found.high - found.low > 0.1


def test_nothing_to_measure_is_not_a_success() -> None:
    assert math.isnan(rate(0, 0).value)
    assert as_json({"first_try": {"sampled": rate(0, 0), "greedy": rate(1, 2)}})["first_try"] == {
        "sampled": {"value": None, "low": 0.0, "high": 1.0, "n": 0},
        "greedy": {"value": 0.5, "low": 0.0945, "high": 0.9055, "n": 2},
    }
