"""`make gpu-check` on a GPU, and what it must show on an H100 or H200; what it showed is in docs/log.md.

The shapes' weights are random, and a random model's log-probabilities move more by rounding than a trained one's: the
bound of 1.05 on `token_mult_prob_error` is that of training.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gpu_check.__main__ import CHECKS, run

pytestmark = pytest.mark.gpu


def found(*names: str) -> list[dict[str, Any]]:
    checks = {check.name: check for check in CHECKS}
    results = {name: run(checks[name], "cuda", small=False) for name in names}
    assert all(result["status"] == "ok" for result in results.values()), results
    return [results[name]["found"] for name in names]


def test_attention_agrees_with_one_masked_softmax() -> None:
    [attention] = found("attention")
    assert attention["error_actor"] < 0.02 and attention["error_flex"] < 0.02


@pytest.mark.te
def test_fp8_is_faster_and_bf16_is_busy_at_the_8b_shape() -> None:
    _, bf16, fp8 = found("8b-fp32", "8b-bf16", "8b-fp8-tensorwise")
    assert bf16["speed/update_mfu"] >= 0.45
    assert fp8["tokens_per_second"] >= 1.15 * bf16["tokens_per_second"]
    assert bf16["prob_error"] < 1.05 and fp8["prob_error"] < 1.2
    assert bf16["grad_norm_error"] < 0.001 and fp8["grad_norm_error"] < 0.01


@pytest.mark.te
def test_lora_needs_neither_gradient_buffers_nor_their_state() -> None:
    _, lora, whole = found("8b-fp32-lora", "8b-bf16-lora", "8b-bf16")
    assert lora["peak"] < whole["peak"] - 30, "GiB; 16 bytes for each of 2.8 billion weights are 41"
    assert lora["prob_error"] < 1.05 and lora["grad_norm_error"] < 0.01


@pytest.mark.te
def test_experts_are_those_of_float32() -> None:
    """BF16 sends some tokens to other experts."""
    _, experts = found("moe-fp32", "moe-bf16")
    assert experts["prob_error"] < 1.2 and experts["grad_norm_error"] < 0.05
    assert experts["speed/update_mfu"] > 0


@pytest.mark.parametrize(("shape", "most"), [("8b-full", 1.1), ("moe", 1.2)])
def test_a_refit_takes_less_than_a_second_and_sleep_frees_the_engine(shape: str, most: float) -> None:
    [engine] = found(f"rollout-{shape}")
    assert engine["refit_seconds"] < 1
    assert engine["freed_gib"] > engine["weights_gib"]
    assert engine["prob_error"] < most and engine["prob_error_after"] < most


@pytest.mark.te
def test_training_in_fp8_lies_within_the_interval_of_bf16() -> None:
    bf16, fp8 = found("training-bf16", "training-fp8-tensorwise")
    assert abs(fp8["retry_success"] - bf16["retry_success"]) < bf16["plus_minus"] + fp8["plus_minus"]
    assert bf16["retry_success"] > bf16["first_retry_success"] + 0.1
    assert max(bf16["prob_error"], fp8["prob_error"]) < 1.05
