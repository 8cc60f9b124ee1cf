"""Optimizer state that leaves the device between updates changes nothing, on one rank, over two, and of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_r3.actor.offload import LEAST, HostBuffer, sizes_of_pieces

CASES = [(layout, precision) for layout in ("one", "dp2", "ep2") for precision in ("bf16", "fp32")]


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
    """Also from a checkpoint that was saved while the state was offloaded."""
    found = every[f"offload-{layout}"][precision]
    assert found["metrics"] and found["weights"] and found["parts"] > 20
    assert found["nan"] == {"skipped": 1.0, "unchanged": True}
    assert found["third"] == found["states"] == [True] * 4


@pytest.mark.parametrize("count", [1, LEAST - 1, LEAST, 3 * LEAST + 1, 33 * LEAST, 66_355_200, 2**30 - 1])
def test_pinned_pieces_take_little_more_than_they_hold(count: int) -> None:
    sizes = sizes_of_pieces(count)
    as_torch_rounds_them = sum(1 << (size - 1).bit_length() for size in sizes)
    assert sum(sizes) == count <= as_torch_rounds_them < count + LEAST / 2
    assert len(sizes) <= count // 2**25 + 6, "few enough to allocate one by one"


def test_what_is_kept_in_several_pieces_comes_back() -> None:
    there, back = torch.randint(256, (3 * LEAST + 1,), dtype=torch.uint8), torch.zeros(3 * LEAST + 1, dtype=torch.uint8)
    kept = HostBuffer(there)
    kept.write_to(back)
    assert kept.nbytes == 3 * LEAST + 1 and torch.equal(back, there)
