from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from nemo_r3.evaluate import as_json, failures_of, measure, rate
from nemo_r3.rollout.scheduler import Attempted
from nemo_r3.types import Answer, Failure, Group, Phase, Problem, Reflection, Segment, Trajectory


def answer(phase: Phase) -> Answer:
    return Answer(Segment(phase, (1,), (-1.0,), 0), "x", "stop")


class Model:
    """Solves even problems at first; with a reflection, those whose number divides by 3."""

    def first_attempts(
        self, problems: Sequence[Problem], step: int, samples: int = 1, greedy: bool = False
    ) -> list[Attempted]:
        first = answer(Phase.ATTEMPT)
        context = Trajectory((Segment(Phase.TASK, (1,)), first.segment))
        return [Attempted(problem, 0, context, first, int(problem.id) % 2 == 0) for problem in problems]

    def reflect_and_retry(
        self, failures: Sequence[Failure], step: int, group_size: int, greedy: bool = False
    ) -> list[Group]:
        turns = answer(Phase.REFLECTION), answer(Phase.RETRY)
        return [
            Group(failure, (Reflection(0, failure.context, *turns, float(int(failure.problem.id) % 3 == 0)),))
            for failure in failures
        ]


def test_rates_of_a_model_that_is_known() -> None:
    problems = [Problem(str(i), "", {}) for i in range(60)]
    scores, fixed = measure(Model(), problems)
    assert fixed == failures_of(Model().first_attempts(problems, 0))
    assert measure(Model(), problems, fixed) == (scores, fixed)
    for mode in ("sampled", "greedy"):
        assert scores["first_try"][mode].value == 0.5
        assert scores["retry_success_fixed"][mode].value == pytest.approx(10 / 30, abs=1e-4)
        assert scores["within_two"][mode].value == pytest.approx(40 / 60, abs=1e-4)
    assert (scores["first_try"]["greedy"].n, scores["retry_success_fixed"]["greedy"].n) == (60, 30)
    assert set(as_json(scores)["within_two"]["sampled"]) == {"value", "low", "high", "n"}


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
    assert as_json({"first_try": {"sampled": rate(0, 0)}})["first_try"]["sampled"]["value"] is None
