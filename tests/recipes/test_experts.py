"""A model with experts through the loop: sampled, trained with its experts shared by two ranks, exported from one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from experts_run import prepare
from launch import lines, run
from safetensors.torch import load_file


@pytest.mark.parametrize(
    ("lora_rank", "replay"),
    [(0, True), pytest.param(0, False, marks=pytest.mark.slow), pytest.param(4, True, marks=pytest.mark.slow)],
)
def test_two_steps_and_an_export_at_another_layout(tmp_path: Path, lora_rank: int, replay: bool) -> None:
    """With replay also an engine of two ranks, each of which judges, and hands on, half of its turns."""
    settings = [*prepare(tmp_path), "train.steps=2"]
    settings += [f"actor.lora_rank={lora_rank}", f"actor.routing_replay={str(replay).lower()}"]
    layout = ["actor.expert_parallel=2", f"rollout.tensor_parallel={1 + replay}"]
    told = run("train", *settings, *layout, ranks=2, path=tmp_path).stdout
    assert "tensor_parallel=1 pipeline_parallel=1 expert_parallel=2, ranks: 2\n" in told
    logged = lines(tmp_path / "run" / "metrics.jsonl")
    assert [step["step"] for step in logged] == [1, 2]
    for step in logged:
        assert step["groups_used"] and step["grad_norm"] > 0
        assert abs(step["token_mult_prob_error"] - 1) < 1e-4, "vLLM has the weights that are trained"
        assert ("routing_mismatch" in step) == replay
        assert step.get("routing_mismatch", 0) < 0.01, "in float32 both choose alike, but for a tie here and there"
    run("export", *settings, path=tmp_path)  # which compares it with transformers
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("model", "run/export"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    if lora_rank:
        assert moved == {name for name in before if name.endswith("_proj.weight") and "self_attn" in name}
    else:
        assert {f"model.layers.{at}.up_proj.weight" for at in ("0.mlp.experts.0", "1.mlp.experts.7")} <= moved
