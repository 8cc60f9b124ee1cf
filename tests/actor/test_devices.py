"""Every tensor is on the right device, shown without a GPU: see `pretended_gpu.py` for what that can show."""

from __future__ import annotations

from typing import Any

import pytest
from pytest import approx

CASES = [(layout, precision) for layout in ("tp2", "pp2") for precision in ("fp32", "bf16", "lora")]
CASES += [("ep2", "experts"), ("ep2", "experts+lora")]


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
    away = precision in ("bf16", "experts")
    assert (found["held"]["optimizer state"] == 0) == away
    assert (found["held"].get("optimizer state on the host", 0) > 0) == away
    assert found["left"] == 0, "an update leaves something behind that would hold its memory"


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_nccl_connects_all_groups_before_the_engine_measures_memory(devices: Any, layout: str, precision: str) -> None:
    assert devices.found[f"{layout}-{precision}"]["connected late"] == []


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_float32_is_what_it_is_on_a_cpu(devices: Any, two: Any, layout: str) -> None:
    ours, theirs = devices.found[f"{layout}-fp32"]["metrics"], two.found[f"{layout}-qwen2"]["metrics"]
    for one, other in zip(ours, theirs[:2], strict=True):
        assert one == approx(other, rel=1e-3, abs=1e-6)
