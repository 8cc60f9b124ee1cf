"""The recipe that shows dialogues, on a model that solves some of the problems."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launch import QUICKSTART, run

from nemo_r3.types import NO_ROOM, Answer, Attempt, Group, Phase, Problem, Reflection, Segment, Trajectory
from recipes.preview import unfinished, verdict, warn_of_other_verdicts


def test_failures_come_first_and_a_right_answer_is_not_reflected_on(tmp_path: Path) -> None:
    shown = run(
        "preview",
        QUICKSTART,
        "20",
        "task.options.test_size=1844",
        "rollout.max_reflection_tokens=2",
        f"run.dir={tmp_path}/run",
    ).stdout
    head, *dialogues = shown.split("\n=== problem ")
    assert "\n--- " not in head and len(dialogues) == 20
    verdicts = [[line for line in text.splitlines() if line.startswith("--- verdict")] for text in dialogues]
    assert 0 < sum(found[0] == "--- verdict: passed" for found in verdicts) < 20
    assert [len(found) for found in verdicts] == sorted((len(found) for found in verdicts), reverse=True)
    assert all(len(found) == (1 if found[0].endswith("passed") else 2) for found in verdicts)
    assert " of 20 problems solved at first try" in dialogues[-1] and "every answer" not in dialogues[-1]
    cut = "\n--- cut at rollout.max_reflection_tokens\n"
    assert [text.count(cut) for text in dialogues] == [len(found) - 1 for found in verdicts]
    assert not (tmp_path / "run").exists()


def test_what_is_not_whole_says_why() -> None:
    answers = [Answer(Segment(Phase.RETRY, ()), "", reason) for reason in ("stop", "length", NO_ROOM)]
    said = [verdict(answer, False) for answer in answers]
    assert said[0] == "--- verdict: failed"
    assert "max_answer_tokens" in said[1] and "max_model_len" in said[2]
    assert unfinished(answers[0], "max_reflection_tokens") == ""
    assert "max_model_len" in unfinished(answers[2], "max_reflection_tokens")


def test_a_verifier_that_changes_its_mind_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(reason: str = "stop") -> Answer:
        return Answer(Segment(Phase.RETRY, ()), "42", reason)

    whole, right, wrong, unasked = Trajectory(), *(Problem(name, "?", {}) for name in ("right", "wrong", "unasked"))
    attempts = [Attempt(right, 0, whole, answer(), True), Attempt(wrong, 0, whole, answer(), False)]
    attempts.append(Attempt(unasked, 0, whole, answer(NO_ROOM), False))
    groups = [Group(attempts[1], (Reflection(0, whole, answer(), answer(), True),))]
    pure: Any = SimpleNamespace(name="pure", verify=lambda problem, text: problem.id == "right")
    fair: Any = SimpleNamespace(name="fair", verify=lambda problem, text: True)
    warn_of_other_verdicts(pure, attempts, [])
    assert capsys.readouterr().err == ""
    warn_of_other_verdicts(pure, attempts, groups)
    assert "pure.verify gave 1 of 3 answers another verdict" in capsys.readouterr().err
    warn_of_other_verdicts(fair, attempts, groups)
    assert (
        "fair.verify gave 1 of 3 answers another verdict when it was asked again, such as one to problem 'wrong'"
        in (capsys.readouterr().err)
    )
