"""Optimizer state that leaves the device between updates changes nothing, on one rank and sharded over two."""

from __future__ import annotations

from typing import Any

import pytest

CASES = [(layout, precision) for layout in ("one", "dp2") for precision in ("bf16", "fp32")]


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_nothing_is_held_between_updates(every: dict[str, Any], layout: str, precision: str) -> None:
    found = every[f"offload-{layout}"][precision]
    for when in ("held_at_start", "held"):
        (state, gradients), moved = found[when]
        assert state > 0 and gradients > 0
        assert moved == [0, 0], when
    assert found["held_after_save"] == found["held_after_load"] == [0, 0]


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_training_is_the_same_bit_for_bit(every: dict[str, Any], layout: str, precision: str) -> None:
    found = every[f"offload-{layout}"][precision]
    assert found["metrics"] and found["weights"] and found["parts"] > 20
    assert found["nan"] == {"skipped": 1.0, "unchanged": True}
    assert found["third"][1] and found["states"][1]


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_a_checkpoint_saved_while_offloaded_is_whole(every: dict[str, Any], layout: str, precision: str) -> None:
    found = every[f"offload-{layout}"][precision]
    assert found["third"] == [True] * 4
    assert found["states"] == [True] * 4
