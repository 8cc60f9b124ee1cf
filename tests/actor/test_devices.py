"""Every tensor is on the right device, shown without a GPU: see `pretended_gpu.py` for what that can show."""

from __future__ import annotations

from typing import Any

import pytest
from pytest import approx

CASES = [(layout, precision) for layout in ("tp2", "pp2") for precision in ("fp32", "bf16", "lora")]
CASES += [("ep2", "experts"), ("ep2", "experts+lora+replay")]


def test_what_cuda_would_refuse_is_refused(devices: Any) -> None:
    for what, said in devices.found["mixed"].items():
        assert "tensors on" in said, what


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_all_that_a_run_does_with_a_policy_stays_on_the_gpu(devices: Any, layout: str, precision: str) -> None:
    assert devices.code == 0, devices.errors[-4000:]
    found = devices.found[f"{layout}-{precision}"]
    assert found["parameters"] == found["exported"] == ["cuda:0"]
    assert found["layers"] > 0 and found["resumed"] and found["nan"] == {"skipped": 1.0, "unchanged": True}
    assert found["score"] < (0.3 if precision in ("bf16", "lora") else 1e-4)
    assert found["apart"] < 0.01, "each update adds LoRA's products to the starting weights, which are on the host"
    away = precision in ("bf16", "experts")
    assert (found["held"]["optimizer state"] == 0) == away
    assert (found["held"].get("optimizer state on the host", 0) > 0) == away
    assert found["left"] == 0, "an update leaves something behind that would hold its memory"


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_nccl_connects_all_groups_before_the_engine_measures_memory(devices: Any, layout: str, precision: str) -> None:
    assert devices.found[f"{layout}-{precision}"]["connected late"] == []


@pytest.mark.parametrize(
    ("name", "on_a_cpu"),
    [
        ("tp2-fp32", "tp2-qwen2"),
        ("pp2-fp32", "pp2-qwen2"),
        ("ep2-experts", "ep2-qwen3_moe"),  # whose reference is on the host
    ],
)
def test_float32_is_what_it_is_on_a_cpu(devices: Any, two: Any, name: str, on_a_cpu: str) -> None:
    ours, theirs = devices.found[name]["metrics"], two.found[on_a_cpu]["metrics"]
    for one, other in zip(ours, theirs[:2], strict=True):
        assert one == approx(other, rel=1e-3, abs=1e-6)
