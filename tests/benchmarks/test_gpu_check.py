"""The checks of `make gpu-check` at tiny size, and what the runner makes of those that fail."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_check import attention
from benchmarks.gpu_check.__main__ import CHECKS, Check, run
from benchmarks.gpu_check.update import distance

CPU = torch.device("cpu")


def test_a_check_runs_in_its_own_process() -> None:
    result = run(Check("attention", "benchmarks.gpu_check.attention", ("torch",), 120), "cpu", small=True)
    assert result["status"] == "ok", result
    assert result["found"]["error_actor"] < 1e-5 and result["found"]["ms_actor"] > 0


def test_a_failed_a_late_and_an_impossible_check_say_why() -> None:
    failed = run(Check("a", "benchmarks.no_such_module", (), 60), "cpu", small=True)
    assert failed["status"] == "failed" and "no_such_module" in failed["reason"]
    late = run(Check("b", "benchmarks.gpu_check.attention", (), 0.2), "cpu", small=True)
    assert late["status"] == "failed" and "stopped after 0.2 s" in late["reason"]
    absent = run(Check("c", "benchmarks.gpu_check.attention", ("no_such.package",), 60), "cpu", small=True)
    assert absent == {"status": "skipped", "seconds": 0.0, "reason": "not installed: no_such.package"}


def test_the_mask_is_what_a_row_per_reflection_sees() -> None:
    point = attention.Point(5, 4, 3, 2)
    rows = attention.rows_of(point, 512)
    mask = attention.mask_of(attention.layout_of(point, CPU))
    assert len(mask) == sum(len(row) - 1 - row.shared for row in rows) + point.context * point.groups
    pairs = sum(sum(range(row.shared + 1, len(row))) for row in rows) + point.groups * sum(range(point.context + 1))
    assert int(mask.sum()) == pairs


def test_a_wrong_attention_is_seen() -> None:
    layout = attention.layout_of(attention.SMALL, CPU)
    tensors = attention.draws(layout.positions.numel(), attention.TINY, CPU, torch.float32)
    causal = attention.Layout((0, len(layout.positions)), (), layout.positions)
    assert attention.errors(attention.actor(causal, tensors[0]), attention.masked(layout), tensors) > 0.1


def test_an_update_is_measured_against_float32_and_fp8_is_skipped_with_the_reason() -> None:
    checks = {check.name: check for check in CHECKS}
    assert run(checks["8b-fp32"], "cpu", small=True)["found"] == {"sequences": 8}
    found = run(checks["8b-bf16"], "cpu", small=True)["found"]
    assert 1 < found["prob_error"] < 1.05 and found["tokens_per_second"] > 0 and found["speed/update_tflops"] > 0
    assert "speed/update_mfu" not in found, "the peak of a CPU is not known"
    skipped = run(Check("fp8", "benchmarks.gpu_check.update", (), 120, ("--precision", "fp8-delayed")), "cpu", True)
    assert skipped["status"] == "skipped" and "needs an NVIDIA GPU" in skipped["reason"]


def test_distance_is_that_of_the_tokens() -> None:
    found = distance([[-1.0, -2.0], [-3.0]], [[-1.0, -2.1], [-3.0]])
    assert found["largest_gap"] == pytest.approx(0.1)
    assert found["prob_error"] == pytest.approx((2 + 2.718281828**0.1) / 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_kernels_on_a_gpu_agree_with_one_masked_softmax() -> None:
    found = attention.measure(torch.device("cuda"), small=False)
    assert found["error_actor"] < 0.02 and found["error_flex"] < 0.02


@pytest.mark.gpu
@pytest.mark.te
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_fp8_is_faster_and_bf16_is_busy_at_the_8b_shape() -> None:
    checks = {check.name: check for check in CHECKS}
    found = {name: run(checks[f"8b-{name}"], "cuda", small=False) for name in ("fp32", "bf16", "fp8-tensorwise")}
    assert all(result["status"] == "ok" for result in found.values()), found
    bf16, fp8 = found["bf16"]["found"], found["fp8-tensorwise"]["found"]
    assert bf16["speed/update_mfu"] >= 0.45
    assert fp8["tokens_per_second"] >= 1.3 * bf16["tokens_per_second"]
    assert max(bf16["prob_error"], fp8["prob_error"]) < 1.05
