"""In which order an evaluation reads, measures and refits, and on whose failures; what it finds is in test_verbs.py."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_r3.actor import checkpoint
from nemo_r3.config import Config
from nemo_r3.types import Answer, Attempt, Group, Phase, Problem, Segment, Trajectory
from recipes import checkpoints
from recipes import evaluate as recipe

NAMES = ("first_try", "within_two", "within_two_resampled", "attempts_truncated")
RETRIES = ("retry_success_fixed", "retry_success_donor", "retry_success_reread")


def failure_of(name: str) -> Group:
    answer = Answer(Segment(Phase.ATTEMPT, (1,), (-1.0,), 0), "", "stop")
    return Group(Attempt(Problem(name, "", {}), 0, Trajectory(), answer, False), ())


@pytest.mark.parametrize("trained", [Path("step_000004"), None])
def test_the_trained_model_is_measured_last_and_on_the_starting_models_failures(
    monkeypatch: pytest.MonkeyPatch, trained: Path | None
) -> None:
    done: list[Any] = []
    fixed, own = [failure_of("of the start")], [failure_of("of the trained")]

    def measure(_: Any, problems: Any, given: Any = None) -> Any:
        done.append(("measured", given))
        verdicts = {name: {"sampled": [given is not None]} for name in (*NAMES, *RETRIES)}
        return verdicts, fixed if given is None else own

    run = SimpleNamespace(
        path=Path("run"),
        timed=lambda phase: nullcontext(),
        add_to_summary=lambda **entries: done.append(entries["difference"]) or {},
        write_verdicts=lambda problems, failures, verdicts: done.append((failures[0].problem.id, list(verdicts))),
        write_dialogues=done.append,
    )
    setup = SimpleNamespace(
        run=run,
        config=Config(),
        world=SimpleNamespace(is_main=True),
        progress=SimpleNamespace(say=lambda line: None, begin=lambda title: None),
        task=SimpleNamespace(problems=lambda split: []),
        check_trackers=lambda: None,
    )
    monkeypatch.setattr(recipe, "join", lambda argv, trains: setup)
    monkeypatch.setattr(recipe, "start_policy", lambda _: "policy")
    monkeypatch.setattr(recipe, "start_rollout", lambda _: SimpleNamespace(engine="engine", too_long=set()))
    monkeypatch.setattr(recipe, "refit", lambda *given: done.append(given))
    monkeypatch.setattr(recipe, "measure", measure)
    monkeypatch.setattr(recipe, "report", lambda _: None)
    monkeypatch.setattr(checkpoints, "trained", lambda _: trained)
    monkeypatch.setattr(checkpoint, "load_weights", lambda policy, path: done.append(path) or {"step": 4})
    recipe.evaluate([])
    if trained is None:
        assert done == [("measured", None), None, ("of the start", ["before"]), {0: fixed}]
        return
    *acts, differences, verdicts, dialogues = done
    assert acts == [trained, ("measured", None), ("policy", "engine"), ("measured", fixed)]
    assert differences["first_try"]["sampled"]["value"] == 1.0
    assert (verdicts, dialogues) == (("of the start", ["before", "after"]), {0: fixed, 4: own})
