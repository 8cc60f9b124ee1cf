"""Training on the current policy's own failures, without a bank."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import QUICKSTART, SMALL, lines, run

from recipes.fault_injection import untimed


@pytest.mark.slow
def test_a_run_without_a_bank_resumes_on_other_ranks_as_if_undisturbed(tmp_path: Path) -> None:
    settings = (QUICKSTART, *SMALL, "failures.source=online", "train.save_every=2", "actor.lr_decay_steps=3")
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run("train", *settings, f"run.dir={whole}", "train.steps=3", ranks=2)
    run("train", *settings, f"run.dir={parted}", "train.steps=2")
    run("train", *settings, f"run.dir={parted}", "train.steps=3", ranks=2)
    assert not (whole / "failures").exists()

    for step in (1, 2, 3):
        file = f"rollouts/step_{step:06d}.jsonl"
        said = [[(row["problem_id"], row["retry"]) for row in lines(path / file)] for path in (whole, parted)]
        assert len(said[0]) == 64 and said[0] == said[1]
    for step, other in zip(untimed(whole / "metrics.jsonl"), untimed(parted / "metrics.jsonl"), strict=True):
        assert step["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert abs(step["token_mult_prob_error"] - 1) < 1e-4
