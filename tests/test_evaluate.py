from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from nemo_r3.evaluate import (
    DONOR_STEP,
    EVALUATION_STEP,
    REREADING_STEP,
    RESAMPLING_STEP,
    difference,
    differences,
    measure,
    measure_while_training,
    numbers,
    rate,
    scores,
)
from nemo_r3.types import Answer, Attempt, Group, Phase, Problem, Reflection, Segment, Trajectory


def answer(phase: Phase, token: int = 1, cut: bool = False) -> Answer:
    return Answer(Segment(phase, (token,), (-1.0,), 0), "x", "length" if cut else "stop")


@dataclass(frozen=True)
class Model:
    """Fails at problems whose number is a multiple of (one when sampled, one when greedy), at either try.

    A second first answer passes where the number is a multiple of `resampled`. First answers are cut at multiples of 3,
    reflections at those of 4, retries at those of 5; reflections at multiples of 6 hold the answer. The token of
    a reflection is its problem's number and what the model `writes`; a retry on another problem passes after it if that
    is a multiple of 4.
    """

    first: tuple[int, int]
    second: tuple[int, int]
    resampled: int = 4
    writes: int = 0

    def first_attempts(
        self, problems: Sequence[Problem], step: int, samples: int = 1, greedy: bool = False
    ) -> list[Attempt]:
        return [self._attempt(problem, step, greedy) for problem in problems]

    def _attempt(self, problem: Problem, step: int, greedy: bool) -> Attempt:
        assert step < 0, "the random numbers of training steps"
        number = int(problem.id)
        first = answer(Phase.ATTEMPT, cut=number % 3 == 0)
        passed = number % self.resampled == 0 if step == RESAMPLING_STEP else number % self.first[greedy] > 0
        return Attempt(problem, 0, Trajectory((Segment(Phase.TASK, (1,)), first.segment)), first, passed)

    def reflect_and_retry(
        self, failures: Sequence[Attempt], step: int, group_size: int, greedy: bool = False
    ) -> list[Group]:
        assert step < 0
        return [Group(failure, (self._reflection(failure, greedy),)) for failure in failures]

    def _reflection(self, failure: Attempt, greedy: bool) -> Reflection:
        number = int(failure.problem.id)
        turns = (
            answer(Phase.REFLECTION, number + self.writes, cut=number % 4 == 0),
            answer(Phase.RETRY, cut=number % 5 == 0),
        )
        return Reflection(0, failure.context, *turns, number % self.second[greedy] > 0, number % 6 == 0)

    def retry_after(self, failures: Sequence[Attempt], reflections: Sequence[Answer], step: int) -> list[Reflection]:
        steps = {EVALUATION_STEP, RESAMPLING_STEP, DONOR_STEP, REREADING_STEP}
        assert len(steps) == 4 and step in (DONOR_STEP, REREADING_STEP), "the random numbers of other answers"
        return [
            Reflection(0, failure.context, donor, answer(Phase.RETRY), donor.segment.ids[0] % 4 == 0)
            for failure, donor in zip(failures, reflections, strict=True)
        ]


CHOSEN = ("first_try", "retry_success_fixed", "within_two")
PROBLEMS = [Problem(str(i), "", {}) for i in range(60)]


def test_the_second_try_is_measured_on_the_same_failures_before_and_after() -> None:
    verdicts, fixed = measure(Model(first=(2, 3), second=(6, 4)), PROBLEMS)
    assert [int(group.failure.problem.id) for group in fixed] == list(range(0, 60, 2)), "the sampled ones"
    before = scores(verdicts)
    assert {name: before[name] for name in CHOSEN} == {
        "first_try": {"sampled": rate(30, 60), "greedy": rate(40, 60)},
        "retry_success_fixed": {"sampled": rate(20, 30), "greedy": rate(15, 30)},
        "within_two": {"sampled": rate(50, 60), "greedy": rate(55, 60)},
    }
    verdicts, retried = measure(Model(first=(5, 10), second=(20, 30)), PROBLEMS, fixed)
    assert [group.failure for group in retried] == [group.failure for group in fixed]
    assert [group.reflections[0].passed for group in retried] == verdicts["retry_success_fixed"]["sampled"]
    after = scores(verdicts)
    assert {name: after[name] for name in CHOSEN} == {
        "first_try": {"sampled": rate(48, 60), "greedy": rate(54, 60)},
        "retry_success_fixed": {"sampled": rate(27, 30), "greedy": rate(28, 30)},
        "within_two": {"sampled": rate(57, 60), "greedy": rate(58, 60)},
    }


def test_while_training_the_sampled_rates_are_the_same() -> None:
    _, fixed = measure(Model(first=(2, 3), second=(6, 4)), PROBLEMS)
    trained = Model(first=(5, 10), second=(20, 30))
    after, _ = measure(trained, PROBLEMS, fixed)
    names = {"first_try": "first_try", "second_try": "retry_success_fixed", "within_two": "within_two"}
    expected = {name: scores(after)[theirs]["sampled"]["value"] for name, theirs in names.items()}
    assert measure_while_training(trained, PROBLEMS, [group.failure for group in fixed]) == expected
    assert measure_while_training(trained, PROBLEMS[1:5], [])["second_try"] is None


def test_the_second_try_is_compared_with_a_second_first_answer() -> None:
    verdicts, _ = measure(Model(first=(2, 3), second=(6, 4)), PROBLEMS)
    found = scores(verdicts)
    assert found["within_two_resampled"] == {"sampled": rate(45, 60)}  # odd ones, and multiples of 4
    # even numbers: reflecting fails at multiples of 6, resampling passes at those of 4, so 10 gained and 5 lost
    assert found["reflection_adds"] == {"sampled": difference([False] * 10 + [True] * 50, [True] * 55 + [False] * 5)}
    assert found["reflection_adds"]["sampled"]["value"] == round(5 / 60, 4)


def test_the_second_try_is_compared_with_one_after_the_next_failures_reflection() -> None:
    verdicts, fixed = measure(Model(first=(2, 3), second=(6, 4)), PROBLEMS)
    numbers = [*range(0, 60, 2)]
    assert [int(group.failure.problem.id) for group in fixed] == numbers
    donor = [number % 4 == 0 for number in [*numbers[1:], 0]]
    assert verdicts["retry_success_donor"] == {"sampled": donor}
    found = difference(donor, [number % 6 > 0 for number in numbers])
    assert scores(verdicts)["content_adds"] == {"sampled": found}
    after, _ = measure(Model(first=(60, 60), second=(20, 30)), PROBLEMS, fixed)
    assert after["retry_success_donor"] == {"sampled": donor}, "on the starting model's failures"


def test_the_gain_is_split_into_reading_and_writing() -> None:
    before, fixed = measure(Model(first=(2, 3), second=(6, 4)), PROBLEMS)
    after, _ = measure(Model(first=(60, 60), second=(20, 30), writes=1), PROBLEMS, fixed)
    assert before["retry_success_reread"]["sampled"] == before["retry_success_fixed"]["sampled"]
    assert scores(before)["writing_adds"]["sampled"]["value"] == 0
    reread = [number % 4 == 0 for number in range(0, 60, 2)]  # after the starting model's reflection, of that token
    assert after["retry_success_reread"] == {"sampled": reread}
    assert scores(after)["writing_adds"]["sampled"] == difference(reread, [n % 20 > 0 for n in range(0, 60, 2)])


@pytest.mark.parametrize("failures", [0, 1])
def test_a_lone_failure_has_no_donor(failures: int) -> None:
    verdicts, fixed = measure(Model(first=(2, 2), second=(6, 4)), [Problem(str(i), "", {}) for i in range(failures)])
    assert len(fixed) == failures
    found = scores(verdicts)
    for name in ("retry_success_donor", "content_adds"):
        assert (found[name]["sampled"]["value"], found[name]["sampled"]["n"]) == (None, 0)


def test_reflections_that_hold_the_answer_and_cut_turns_are_counted() -> None:
    verdicts, fixed = measure(Model(first=(2, 3), second=(6, 4)), PROBLEMS)
    found = scores(verdicts)
    assert found["reflection_solves"] == {"sampled": rate(10, 30), "greedy": rate(10, 30)}
    assert found["attempts_truncated"]["sampled"] == rate(20, 60)
    assert found["reflections_truncated"]["sampled"] == rate(15, 30)
    assert found["retries_truncated"]["greedy"] == rate(6, 30)
    assert len(fixed) == 30


def test_a_difference_counts_what_changed_in_pairs() -> None:
    before = [True] * 40 + [False] * 60
    after = [True] * 35 + [False] * 5 + [True] * 15 + [False] * 45  # 5 lost, 15 gained
    found = difference(before, after)
    assert found == {"value": 0.1, "low": 0.0146, "high": 0.1854, "n": 100}
    # by hand: 1.96 * sqrt(20 - 100 / 100) / 100 = 0.0854; the separate intervals overlap
    assert rate(40, 100)["high"] > rate(50, 100)["low"]
    assert difference(before, before) == found | {"value": 0.0, "low": 0.0, "high": 0.0}
    assert difference([False] * 9, [True] * 9)["value"] == 1.0
    assert difference([], [])["value"] is None


def test_what_training_changed_is_paired_for_every_measure() -> None:
    before, fixed = measure(Model(first=(2, 3), second=(6, 4)), PROBLEMS)
    after, _ = measure(Model(first=(5, 10), second=(20, 30)), PROBLEMS, fixed)
    found = differences(before, after)
    assert found.keys() == before.keys() == after.keys()
    assert found["first_try"]["sampled"] == difference([i % 2 > 0 for i in range(60)], [i % 5 > 0 for i in range(60)])
    evens = range(0, 60, 2)
    expected = difference([i % 4 > 0 for i in evens], [i % 30 > 0 for i in evens])
    assert found["retry_success_fixed"]["greedy"] == expected


def test_an_attempt_without_tokens_is_no_failure_to_reflect_on() -> None:
    class NoRoom(Model):
        def _attempt(self, problem: Problem, step: int, greedy: bool) -> Attempt:
            found = super()._attempt(problem, step, greedy)
            unsampled = Answer(Segment(Phase.ATTEMPT, (), (), 0), "", "no_room")
            return found if problem.id != "0" else replace(found, answer=unsampled, passed=False)

    verdicts, reflected = measure(NoRoom(first=(2, 2), second=(5, 5)), [Problem(str(i), "", {}) for i in range(3)])
    assert [group.failure.problem.id for group in reflected] == ["2"]
    assert verdicts["first_try"]["sampled"] == [False, True, False]
    assert verdicts["within_two"]["sampled"] == [False, True, True]


def test_the_interval_is_wilsons() -> None:
    # as statsmodels' proportion_confint(8, 10, method="wilson")
    assert rate(8, 10) == {"value": 0.8, "low": 0.4902, "high": 0.9433, "n": 10}


def test_the_interval_stays_inside_0_and_1_and_nothing_to_measure_is_not_a_success() -> None:
    for found in (rate(0, 20), rate(20, 20)):
        assert 0.0 <= found["low"] <= found["value"] <= found["high"] <= 1.0
        assert found["high"] - found["low"] > 0.1
    assert rate(0, 0) == {"value": None, "low": 0.0, "high": 1.0, "n": 0}


def test_a_summary_as_flat_numbers_leaves_out_what_was_not_measured() -> None:
    before = {"first_try": {"sampled": rate(1, 2), "greedy": rate(0, 0)}}
    summary = {"before": before, "step": 3, "versions": {"torch": "2"}}
    assert numbers(summary) == {"before/first_try/sampled": 0.5}
