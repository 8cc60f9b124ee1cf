"""When held-out problems are measured, and the starting model's failures on them, which a run keeps."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from first_answers import ALONE, STAMP, Scripted, problems

from nemo_r3.actor.policy import Policy
from nemo_r3.config import Config
from nemo_r3.evaluate import EVALUATION_STEP
from nemo_r3.failures.stamp import hash_of
from nemo_r3.rollout.turn_cache import TurnCache
from nemo_r3.types import NO_ROOM, Answer, Attempt, Phase, Segment, Trajectory
from recipes import held_out
from recipes.held_out import FILE, HeldOut


class Started:
    """What a process of a run has, whose engine answers nothing right."""

    def __init__(self, path: Path, every: int = 10, count: int = 6, seed: int = 1) -> None:
        config, self.said = Config(), list[str]()
        config.evaluate.every, config.evaluate.problems, config.seed = every, count, seed
        self.rollout: Any = Scripted(passes=0)
        self.rollout.turns, self.rollout.engine = TurnCache(enabled=True), SimpleNamespace(version=0)
        setup: Any = SimpleNamespace(
            config=config,
            task=SimpleNamespace(problems=lambda split: problems(8) if split == "test" else []),
            run=SimpleNamespace(path=path, timed=lambda phase: nullcontext()),
            world=ALONE,
            progress=SimpleNamespace(say=self.said.append, begin=lambda title: None),
        )
        self.held_out = HeldOut(setup, cast(Policy, SimpleNamespace(version=0)), self.rollout)


@pytest.fixture(autouse=True)
def refits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The engine is one of no policy; a list of the refits asked for."""
    asked: list[int] = []
    monkeypatch.setattr(held_out, "refit_if_behind", lambda *_: asked.append(1))
    monkeypatch.setattr(held_out, "stamp_of", lambda setup, asked, samples: replace(STAMP, problems=hash_of(asked)))
    return asked


def test_the_starting_model_is_asked_once_in_a_runs_life(tmp_path: Path, refits: list[int]) -> None:
    first, second = Started(tmp_path, count=0), Started(tmp_path, count=0)
    assert first.said == [
        "the starting model answers 8 held-out problems, as later weights will (evaluate.problems=0 evaluate.every=10)"
    ]
    assert (first.rollout.asked, first.rollout.steps) == (8, {EVALUATION_STEP})
    assert second.rollout.asked == 0 and len(refits) == 1
    assert second.held_out._failures == first.held_out._failures and len(first.held_out._failures) == 8


def test_a_problem_that_found_no_room_is_no_failure_to_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsampled(*_: Any) -> list[Attempt]:
        answer = Answer(Segment(Phase.ATTEMPT, (), (), 0), "", NO_ROOM)
        return [Attempt(problem, 0, Trajectory(), answer, passed=False) for problem in problems(1)]

    monkeypatch.setattr(Scripted, "first_attempts", unsampled)
    assert Started(tmp_path).held_out._failures == []


def test_with_other_problems_or_seed_or_a_damaged_file_it_is_asked_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Started(tmp_path)
    assert Started(tmp_path, seed=2).rollout.asked == 6, "evaluation answers with other seeds, too"
    assert Started(tmp_path, count=0).rollout.asked == 8, "all"
    assert capsys.readouterr().err == ""
    file = tmp_path / FILE
    file.write_text(file.read_text().replace("7 8", "7 9", 1))
    assert Started(tmp_path, count=0).rollout.asked == 8
    assert f"warning: {file} is damaged (changed since it was written)" in capsys.readouterr().err


def test_every_so_many_steps_are_measured_and_the_step_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"first_try": 0.25, "second_try": None, "within_two": 0.5}
    monkeypatch.setattr(held_out, "measure_while_training", lambda *_: rates)
    run = Started(tmp_path)
    found = {step: metrics for step in range(1, 31) if (metrics := run.held_out.measured(step))}
    assert list(found) == [1, 11, 21] and run.rollout.turns.step == 21
    assert found[11] == {f"held_out/{name}": value for name, value in rates.items()}
    assert run.said[2] == "held out, after step 10: first try 0.250  second try -  within two 0.500"
    run.rollout.engine.version = -1
    with pytest.raises(AssertionError, match="newest weights"):
        run.held_out.measured(31)


def test_without_the_setting_nothing_is_asked(tmp_path: Path) -> None:
    run = Started(tmp_path, every=0)
    assert run.rollout.asked == 0 and not list(tmp_path.iterdir())
    assert run.held_out.measured(1) == {} and run.said == []
