"""Training with routing replay on a GPU, which nobody has tried yet: vLLM records there by its own model runner.

Random weights in BF16 choose other experts now and then. Where the actor follows vLLM, both give tokens nearly the same
probability; where what was recorded is another token's, they do not.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from experts_run import prepare
from launch import lines, run

pytestmark = pytest.mark.gpu
SHAPE = {
    "hidden_size": 256,
    "head_dim": 64,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "initializer_range": 0.1,  # by which BF16 changes choices, and a changed choice the probabilities
}
STEPS = 4


def test_the_actor_follows_vllm(tmp_path: Path) -> None:
    """Most turns end by their stop token, when vLLM has one more step under way."""
    settings = [*prepare(tmp_path, **SHAPE), f"train.steps={STEPS}", "actor.precision=bf16"]
    followed = {}
    for replay in ("false", "true"):
        both = (f"actor.routing_replay={replay}", f"run.dir={tmp_path}/{replay}")
        run("train", *settings, *both, path=tmp_path, fresh=True)
        logged = lines(tmp_path / replay / "metrics.jsonl")
        assert len(logged) == STEPS and all(step["groups_used"] for step in logged)
        followed[replay] = max(step["rollout_kl"] for step in logged)
        assert all(0 < step["routing_mismatch"] < 0.2 for step in logged if replay == "true")
    assert followed["true"] < followed["false"] / 2
