"""The drill: kills leave no trace, and a trace is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch import QUICKSTART, SMALL, run

from recipes.fault_injection import differences


def a_run(path: Path, steps: list[int], reward: float = 0.5) -> Path:
    for folder in ("failures", "rollouts"):
        (path / folder).mkdir(parents=True)
        (path / folder / ("shard_00000.jsonl" if folder == "failures" else "step_000001.jsonl")).write_text("{}\n")
    lines = [{"step": step, "reward": reward, "time/rollout": len(str(path))} for step in steps]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_differences_are_named(tmp_path: Path) -> None:
    whole = a_run(tmp_path / "whole", [1, 2])
    assert differences(whole, a_run(tmp_path / "same but slower", [1, 2]), 2) == []
    assert differences(whole, a_run(tmp_path / "twice", [1, 2, 2]), 2) == ["metrics.jsonl has the steps [1, 2, 2]"]
    (found,) = differences(a_run(tmp_path / "other whole", [1]), a_run(tmp_path / "other", [1], 0.25), 1)
    assert found.startswith("metrics of step 1: {'step': 1, 'reward': 0.25}")
    lost = a_run(tmp_path / "lost", [1, 2])
    (lost / "failures" / "shard_00000.jsonl").unlink()
    (lost / "rollouts" / "step_000001.jsonl").write_text("{")
    assert differences(whole, lost, 2) == ["failures/shard_00000.jsonl", "rollouts/step_000001.jsonl"]


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_the_same(tmp_path: Path) -> None:
    done = run(
        "drill", QUICKSTART, *SMALL, f"run.dir={tmp_path}/run", "train.steps=4", "train.save_every=1", "drill.kills=3"
    )
    assert "kill 3/3 SIGUSR1" in done.stdout
    assert "the same, after 3 kills: failure bank, 4 steps, rollouts" in done.stdout
