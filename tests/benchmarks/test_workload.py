"""The benchmark's workload keeps what it promises to every side."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.sides import apart, ratios
from benchmarks.workload import SMALL, Workload, make


def test_prompts_lengths_and_rewards_are_as_asked(tmp_path: Path) -> None:
    workload = make(tmp_path, SMALL, steps=2)
    assert [len(step) for step in workload.steps] == [SMALL.contexts] * 3
    for context in (context for step in workload.steps[1:] for context in step):
        assert len(context.prompt) == SMALL.prompt
        assert context.prompt[: len(context.task)] == context.task
        assert context.prompt[len(context.task) : len(context.task) + len(context.attempt)] == context.attempt
        assert all(SMALL.shortest <= length <= SMALL.longest for length in context.lengths)
        assert min(context.rewards) != max(context.rewards)
        assert len(context.lengths) == len(context.rewards) == SMALL.group
    assert Workload.read(tmp_path / "workload.json") == workload
    assert make(tmp_path, SMALL, steps=2) == workload


def test_the_model_is_one_that_both_sides_load(tmp_path: Path) -> None:
    make(tmp_path, SMALL, steps=1)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["tie_word_embeddings"] and config["dtype"] == "float32"


def test_ratios_are_of_medians_and_pairs() -> None:
    def steps(*seconds: float) -> list[dict[str, dict[str, float]]]:
        return [{"wall": {"step": s, "update": s, "rollout": s}} for s in seconds]

    found = ratios({"r3": steps(1, 2, 4), "trl": steps(4, 6, 4)}, "trl", ("step", "update"))
    assert (found["step_ratio"], found["step_ratio_low"], found["step_ratio_high"]) == (2, 1, 4)
    assert "rollout_ratio" not in found
    assert ratios({"r3": steps(2), "trl_vllm": steps(3)}, "trl_vllm", ("update",), "_vllm")["update_ratio_vllm"] == 1.5


def test_losses_that_differ_or_are_nan_are_named() -> None:
    assert apart({"loss_difference": 1e-6, "grad_norm_difference": 1e-4}) == []
    assert apart({"loss_difference": 2e-5, "grad_norm_difference": float("nan")}) == [
        "loss_difference",
        "grad_norm_difference",
    ]
