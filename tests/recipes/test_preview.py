"""The recipe that shows dialogues, on a model that solves some of the problems."""

from __future__ import annotations

from pathlib import Path

from launch import QUICKSTART, run

from nemo_r3.types import NO_ROOM, Answer, Phase, Segment
from recipes.preview import unfinished, verdict


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
