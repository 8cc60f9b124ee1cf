"""What a run shows of its training: the curve as it goes, and a line at its end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_r3 import trackers
from nemo_r3.config import Config
from nemo_r3.config.tree import RunConfig
from nemo_r3.errors import VerifierError
from nemo_r3.signals import STOPPED, Stopped
from recipes.outcome import best, change, conclude, conclude_early, draw_curve, report


def a_setup(path: Path, said: list[str], ranks: int = 1) -> Any:
    files = {"path": path, "metrics": path / "metrics.jsonl", "checkpoints": path / "checkpoints"}
    run = SimpleNamespace(**files, add_to_summary=lambda **_: {})
    lines = [{"step": step, "retry_success": step / 10, "groups_used": 1, "groups_dropped": 0} for step in range(1, 11)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SimpleNamespace(
        run=run,
        config=Config(run=RunConfig(dir=str(path))),
        world=SimpleNamespace(is_main=True, size=ranks),
        progress=SimpleNamespace(say=said.append),
    )


@pytest.mark.parametrize(
    ("ranks", "following"),
    [(1, "python -m recipes.evaluate my.yaml 'run.dir=a b'"), (4, "the same command with recipes.evaluate")],
)
def test_a_finished_run_says_what_it_reached_and_what_comes_next(tmp_path: Path, ranks: int, following: str) -> None:
    said: list[str] = []
    conclude(a_setup(tmp_path, said, ranks), ["my.yaml", "run.dir=a b"])
    reached = "retry success 0.30 -> 0.80 (mean of the first and last 5 steps)"
    done = f"done: {reached}; curve: {tmp_path}/curve.png; next: {following}"
    assert said == [f"report: {tmp_path}/report.html", done]
    assert (tmp_path / "curve.png").exists() and (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("end", "code"), [(Stopped("by SIGUSR1"), STOPPED), (VerifierError("away"), 2)])
def test_a_run_that_ends_early_says_what_is_saved_and_its_trackers_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Exception, code: int
) -> None:
    said, codes = list[str](), list[int]()
    setup = a_setup(tmp_path, said)
    setup.world.on_main = lambda act: act()
    monkeypatch.setattr(trackers, "close", codes.append)
    for step in (0, 3):
        conclude_early(setup, end, step)
    assert (said, codes) == (["step 3 is saved"], [code, code])


def test_a_run_of_no_steps_has_nothing_to_show(tmp_path: Path) -> None:
    said: list[str] = []
    setup = a_setup(tmp_path, said)
    setup.config.train.steps = 0
    conclude(setup, ["my.yaml"])
    assert not said and not (tmp_path / "curve.png").exists()


def test_the_best_held_out_step_is_named_with_its_checkpoint(tmp_path: Path) -> None:
    def line(step: int, value: float | None) -> dict[str, Any]:
        return {"step": step, "held_out/second_try": value}

    lines = [line(1, 0.125), {"step": 2}, line(11, 0.5), line(21, None), line(31, 0.5), {"held_out/second_try": 0.9}]
    said = "best second try on held-out problems: 0.50 after step 10"
    assert best(lines, tmp_path, "") == f"{said} (no checkpoint has it)"
    kept = tmp_path / "step_000010"
    kept.mkdir()
    (kept / "manifest.json").touch()
    assert best(lines, tmp_path, "") == f"{said} ({kept})"
    assert best(lines[:2], tmp_path, "").endswith("0.12 after step 0 (untrained)")
    assert best(lines[:2], tmp_path, "other/step_000007").endswith("after step 0 (other/step_000007)")
    assert best([{"step": 1, "retry_success": 0.5}], tmp_path, "") == ""


def test_few_steps_are_compared_by_halves() -> None:
    assert change([0.1, 0.2, 0.6]) == "retry success 0.10 -> 0.60 (the first step and the last)"
    assert change([0.5]) == "no change to show"


def test_a_picture_that_cannot_be_drawn_is_only_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = a_setup(tmp_path, [])
    (tmp_path / "curve.png").mkdir()
    (tmp_path / "report.html").mkdir()
    draw_curve(setup)
    report(setup)
    told = capsys.readouterr().err
    assert "warning: no curve.png: " in told and "warning: no report.html: " in told
