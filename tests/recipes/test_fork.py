"""A new run that starts from another run's checkpoint, with another learning rate."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from launch import QUICKSTART, SMALL, lines, run

from nemo_r3.actor.manifest import MANIFEST, read_manifest
from nemo_r3.config import load
from nemo_r3.files import sealed
from recipes.fault_injection import untimed


def held_out(line: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith("held_out/")}


@pytest.mark.slow
def test_a_fork_goes_on_with_the_weights_and_moments_of_a_checkpoint_and_says_which(
    trained: Path, bank: Path, tmp_path: Path
) -> None:
    """It trains as a run would that resumed there, if only its steps and its learning rate began anew."""
    start, fork, resumed = trained / "checkpoints" / "step_000002", tmp_path / "fork", tmp_path / "resumed"
    settings = (QUICKSTART, *SMALL, f"failures.path={bank}", f"run.dir={fork}", f"train.start_from={start}")
    settings += ("train.steps=2", "evaluate.every=2", "actor.lr=2e-5")
    done = run("train", *settings)
    assert f"starting from {start}, after 2 updates; steps and learning rate begin anew\n" in done.stdout
    assert load([str(fork / "config.yaml")]).train.start_from == str(start)
    first, _ = lines(fork / "metrics.jsonl")
    assert first["lr"] == 2e-5 and first["kl"] > 0  # to the starting model
    assert held_out(first) == held_out(lines(trained / "metrics.jsonl")[2]) != {}
    assert {row["weights_version"] for row in lines(fork / "rollouts" / "step_000001.jsonl")} == {2}

    begun = resumed / "checkpoints" / "step_000000"
    shutil.copytree(start, begun)
    shutil.copy(fork / "config.yaml", resumed)
    last = read_manifest(fork / "checkpoints" / "step_000002")
    anew = {"step": 0, "schedule": last["schedule"] | {"num_steps": 0}, "state": {}}
    (begun / MANIFEST).write_text(sealed(read_manifest(start) | anew))
    done = run("train", str(fork / "config.yaml"), f"run.dir={resumed}")
    assert f"resuming after step 0 from {begun}" in done.stdout
    assert untimed(resumed / "metrics.jsonl") == untimed(fork / "metrics.jsonl")

    run("export", *settings)
    card = (fork / "export" / "README.md").read_text()
    assert "From a checkpoint of another run, see `train.start_from`: 2 steps" in card
    assert f"\n  start_from: {start}\n" in card
