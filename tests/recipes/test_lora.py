"""A run that trains LoRA, from mining's bank to its export."""

from __future__ import annotations

import shutil
from pathlib import Path

from launch import QUICKSTART, SMALL, lines, run
from safetensors.torch import load_file

from nemo_r3.models import EMBEDDED
from recipes.fault_injection import untimed


def test_a_run_resumes_from_its_factors_and_exports_their_sum_with_the_starting_weights(
    bank: Path, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = (QUICKSTART, *SMALL, f"failures.path={bank}", "train.steps=2", "train.save_every=1")
    settings += ("actor.lora_rank=4", "actor.lr=5e-4")
    run("train", *settings, f"run.dir={whole}")
    assert [line["kl"] > 0 for line in lines(whole / "metrics.jsonl")] == [False, True]
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_000002")
    done = run("train", *settings, f"run.dir={resumed}")
    assert f"resuming after step 1 from {resumed}/checkpoints/step_000001" in done.stdout
    assert untimed(resumed / "metrics.jsonl") == untimed(whole / "metrics.jsonl")

    run("export", *settings, f"run.dir={resumed}")
    exported, start = (load_file(path / "model.safetensors") for path in (resumed / "export", EMBEDDED))
    moved = {name for name in start if not exported[name].equal(start[name])}
    assert moved == {name for name in start if name.endswith("_proj.weight")}
