"""What each training step is given to reflect on: from a bank, and from the current policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from first_answers import ALONE, Scripted, attempt, bank, mine, problems

from nemo_r3.errors import UserError
from nemo_r3.failures.source import BankSource, OnlineSource
from nemo_r3.types import Attempt, Problem


def source(path: Path, failures: int, count: int) -> BankSource:
    mine(path, Scripted(), problems(failures))
    return BankSource(bank(path).read(), count, 1, ALONE)


def test_an_epoch_visits_every_failure_once_in_a_new_order(tmp_path: Path) -> None:
    walk = source(tmp_path, failures=12, count=4)
    epochs = [[failure.id for _ in range(3) for failure in walk.draw(0)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"p{i}/1" for i in range(12))
    assert epochs[0] != epochs[1]


def test_the_order_of_a_bank_is_a_promise(tmp_path: Path) -> None:
    """A resumed run goes on where it was, and the quickstart's numbers are in the README."""
    drawn = [failure.id for failure in source(tmp_path, failures=6, count=6).draw(0)]
    assert drawn == ["p2/1", "p1/1", "p0/1", "p4/1", "p3/1", "p5/1"]


def test_a_source_continues_from_its_cursor(tmp_path: Path) -> None:
    walk, resumed = source(tmp_path, failures=10, count=3), source(tmp_path, failures=10, count=3)
    drawn = [walk.draw(step) for step in range(5)]
    assert {len(failures) for failures in drawn} == {3}, "what is left at an epoch's end is dropped"
    resumed.cursor = 3
    assert [resumed.draw(step) for step in range(2)] == drawn[3:]


def test_a_bank_smaller_than_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 3 failures, fewer than train.failures_per_step=4"):
        source(tmp_path, failures=3, count=4)


def test_the_online_source_asks_until_it_has_enough_failures() -> None:
    class EveryThird(Scripted):
        def first_attempts(self, asked: Sequence[Problem], step: int, **__: object) -> list[Attempt]:
            self.asked += len(asked)
            self.steps.add(step)
            return [attempt(problem, 0, int(problem.id[1:]) % 3 != 0) for problem in asked]

    rollout = EveryThird()
    source = OnlineSource(rollout, problems(30), count=4, seed=1)
    drawn = source.draw(7)
    assert len(drawn) == 4
    assert rollout.steps == {7}, "so that another step's answers to a problem are others"
    assert all(int(failure.problem.id[1:]) % 3 == 0 for failure in drawn)
    assert source.cursor == rollout.asked


def test_the_online_source_asks_no_problem_twice_in_a_step() -> None:
    class EveryTenth(Scripted):
        def first_attempts(self, asked: Sequence[Problem], *_: object, **__: object) -> list[Attempt]:
            self.asked += len(asked)
            return [attempt(problem, 0, int(problem.id[1:]) % 10 != 0) for problem in asked]

    source = OnlineSource(EveryTenth(), problems(200), count=20, seed=1)
    source.cursor = 130  # the step runs on into the next epoch
    assert len({failure.id for failure in source.draw(1)}) == 20
    rollout = EveryTenth()
    source = OnlineSource(rollout, problems(30), count=20, seed=1)
    source.cursor = 20  # as does its first batch
    rollout.too_long = {"p3", "held-out"}
    few = "30 first answers gave 3 failures, fewer than train.failures_per_step=20"
    with pytest.raises(UserError, match=rf"{few}; .* rollout.max_model_len \(1 of them\)"):
        source.draw(1)
    assert rollout.asked == 30


def test_the_online_source_gives_up_on_a_policy_that_solves_everything() -> None:
    with pytest.raises(UserError, match="failures.source=online"):
        OnlineSource(Scripted(passes=1), problems(10), count=4, seed=1).draw(1)


def test_online_source_needs_problems() -> None:
    with pytest.raises(UserError, match="failures.source=online: the task has no training problems"):
        OnlineSource(Scripted(passes=1), [], count=4, seed=1)
