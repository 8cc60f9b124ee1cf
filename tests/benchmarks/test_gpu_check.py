"""The checks of `make gpu-check` at tiny size, and what the runner makes of those that fail."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_check import attention
from benchmarks.gpu_check.__main__ import Check, run

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


@pytest.mark.gpu
def test_kernels_on_a_gpu_agree_with_one_masked_softmax() -> None:
    found = attention.measure(torch.device("cuda"), small=False)
    assert found["error_actor"] < 0.02 and found["error_flex"] < 0.02
