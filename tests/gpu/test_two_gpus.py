"""Training on two GPUs, which nobody has tried yet: NCCL, engines of two ranks that sleep, refits between layouts.

A part of a weight that a refit, an all-reduce or an update gets wrong shows as a mismatch of vLLM and the actor.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launch import QUICKSTART, SMALL, lines, run

LAYOUTS = {
    "dp2": (),
    "dp2, one engine": ("rollout.tensor_parallel=2",),
    "tp2, two engines": ("actor.tensor_parallel=2", "actor.sequence_parallel=true"),
    "tp2, one engine": ("actor.tensor_parallel=2", "rollout.tensor_parallel=2"),
    "tp2, LoRA": ("actor.tensor_parallel=2", "actor.sequence_parallel=true", "actor.lora_rank=8", "actor.lr=5e-4"),
    "pp2, two engines": ("actor.pipeline_parallel=2",),
    "pp2, one engine": ("actor.pipeline_parallel=2", "rollout.tensor_parallel=2"),
}
STEPS = 4

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sampler_and_actor_agree_in_every_layout(layout: str, bank: Path, tmp_path: Path) -> None:
    settings = (*SMALL, f"train.steps={STEPS}", f"failures.path={bank}", f"run.dir={tmp_path}/run")
    run("train", QUICKSTART, *settings, "actor.precision=bf16", *LAYOUTS[layout], ranks=2)
    mismatch = [step["token_mult_prob_error"] for step in lines(tmp_path / "run" / "metrics.jsonl")]
    assert len(mismatch) == STEPS and all(mismatch), "a step without a group to learn from: the answers are garbage"
    assert max(mismatch) < 1.05
