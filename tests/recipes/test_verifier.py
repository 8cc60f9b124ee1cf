"""A user's verifier that fails in the middle of a run."""

from __future__ import annotations

import json
from pathlib import Path

from launch import QUICKSTART, run

EVEN = """
from pathlib import Path

from nemo_r3.types import Problem

HERE = Path(__file__).parent


def problems(split):
    first = 0 if split == "train" else 100
    return [Problem(f"word-{i}", f"Say the number {i}.", {}) for i in range(first, first + 24)]


def verify(problem, text):
    if (HERE / "run" / "rollouts" / "step_000001.jsonl").exists() and (HERE / "away").exists():
        raise ConnectionError("the service is away")
    return len(text) % 2 == 0 and text != ""
"""


def test_a_verifier_that_fails_costs_no_step_that_was_done(tmp_path: Path) -> None:
    """It fails in step 2 of three, of which only the last would be saved; one rank goes on where two began."""
    (tmp_path / "even.py").write_text(EVEN)
    (tmp_path / "away").touch()
    settings = [QUICKSTART, "task={name: even}", "task.verifier_threads=2", f"run.dir={tmp_path}/run"]
    settings += ["train.save_in_background=true"]  # the end waits for it
    settings += ["train.steps=3", "train.save_every=3", "train.failures_per_step=4", "failures.problems=24"]
    ended = run("train", *settings, ranks=2, succeed=False, path=tmp_path)
    assert "step 1 is saved" in ended.stdout
    error = "error: task.name: even.verify raised ConnectionError (the service is away) in "
    assert sum(line.startswith(error) for line in ended.stderr.splitlines()) == 1
    assert (tmp_path / "run" / "checkpoints" / "step_000001" / "manifest.json").exists()

    (tmp_path / "away").unlink()
    resumed = run("train", *settings, path=tmp_path)
    assert "resuming after step 1" in resumed.stdout
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["groups_used"] for step in steps)
    assert all(step["speed/verifier_share"] < 0.2 for step in steps)
