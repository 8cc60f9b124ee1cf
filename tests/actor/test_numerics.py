"""What rounding to FP8 is said to cost, against rounding by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from layers import Layer
from torch import Tensor, nn

from nemo_r3.actor import numerics
from nemo_r3.actor.numerics import LayerWatch, Rounding, measure_rounding, rounded
from nemo_r3.precision import BLOCKWISE, MXFP8, TENSORWISE, Recipe
from nemo_r3.runtime import World

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("dtype", "bits"), [(E4M3, 3), (E5M2, 2)])
def test_rounding_is_to_the_formats_bits_and_keeps_the_largest(dtype: torch.dtype, bits: int) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    near = rounded(tensor, dtype)
    large = tensor.abs() > 0.05
    errors = ((near - tensor).abs() / tensor.abs())[large]
    assert 0.2 * 2 ** -(bits + 1) < errors.max() <= 2 ** -(bits + 1) * 1.001
    assert near.abs().max().item() == pytest.approx(tensor.abs().max().item())


@pytest.mark.parametrize("tile", [None, (1, 4), (4, 4)])
def test_rounding_costs_what_it_is_said_to_cost(tile: numerics.Tile | None) -> None:
    tensor = numbers(6, 10)
    back = rounded(tensor, E5M2, tile)
    assert back.shape == tensor.shape
    assert measure_rounding(tensor, E5M2, tile).error == pytest.approx(((back - tensor) ** 2).sum().item(), rel=1e-5)


@pytest.mark.parametrize(("dtype", "bits"), [(E4M3, 3), (E5M2, 2)])
def test_the_error_is_that_of_the_format(dtype: torch.dtype, bits: int) -> None:
    found = measure_rounding(numbers(64, 96), dtype).shares()
    assert found["amax"] == numbers(64, 96).abs().max().item()
    assert found["underflow"] < 1e-3 and found["saturation"] == 0
    uniform = 2.0**-bits / math.sqrt(12) / 1.5  # half a unit in the last place at most, around 1.5
    assert found["error"] == pytest.approx(uniform, rel=0.15)


def test_what_an_outlier_does_to_a_tensor_and_to_its_tile() -> None:
    tensor = numbers(256, 256)
    tensor[3, 5] = 1e8
    whole = measure_rounding(tensor, E4M3).shares()
    assert whole["underflow"] > 0.99 and whole["error"] < 1e-3, "nearly all of the norm is the outlier"
    row, block = (measure_rounding(tensor, E4M3, tile).shares()["underflow"] for tile in ((1, 128), (128, 128)))
    assert row == pytest.approx(127 / 256**2, rel=0.05)
    assert block == pytest.approx((128**2 - 1) / 256**2, rel=0.05)


def test_tiles_at_the_edges_are_smaller() -> None:
    tensor = numbers(5, 7)
    tensor[4, 6] = 1e6
    assert measure_rounding(tensor, E4M3, (2, 3)).shares()["underflow"] == 0, "it is alone in its tile"


def test_a_scale_of_earlier_steps_may_saturate() -> None:
    tensor = torch.tensor([[1.0, 2.0, 3.0, -4.0]])
    found = measure_rounding(tensor, E4M3, scale=torch.tensor(448 / 2.0)).shares()
    assert found["saturation"] == 0.5
    assert found["error"] == pytest.approx(math.sqrt((1 + 4) / 30))


def test_scales_of_powers_of_two_keep_such_numbers_as_they_are() -> None:
    tensor = torch.tensor([[1.0, 0.75, 0.5]])
    assert measure_rounding(tensor, E4M3, (1, 32), powers_of_two=True).error == 0
    tensor = numbers(16, 64)
    assert measure_rounding(tensor, E4M3, (1, 32), powers_of_two=True).shares()["saturation"] == 0


@pytest.mark.parametrize("tile", [None, (1, 128), (128, 128)])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, tile: numerics.Tile | None) -> None:
    whole = measure_rounding(numbers(300, 200), E5M2, tile)
    monkeypatch.setattr(numerics, "CHUNK", 1000)
    parts = measure_rounding(numbers(300, 200), E5M2, tile)
    assert (parts.numbers, parts.underflows, parts.amax) == (whole.numbers, whole.underflows, whole.amax)
    assert parts.error == pytest.approx(whole.error, rel=1e-6)


def test_zeros_cost_nothing_and_nan_is_seen() -> None:
    nothing = dict.fromkeys(("amax", "underflow", "saturation", "error"), 0)
    assert measure_rounding(torch.zeros(4, 4), E4M3).shares() == nothing
    broken, sums = measure_rounding(torch.tensor([[1.0, math.nan]]), E4M3), Rounding()
    for part in (measure_rounding(numbers(2, 2), E4M3), broken, measure_rounding(numbers(2, 2), E4M3)):
        sums.add(part)
    assert math.isnan(sums.shares()["amax"]) and math.isnan(sums.shares()["error"])


@pytest.mark.parametrize(
    ("recipe", "of_gradients", "tile", "weight_tile", "powers_of_two"),
    [
        (TENSORWISE, E5M2, None, None, False),
        (BLOCKWISE, E4M3, (1, 128), (128, 128), False),
        (MXFP8, E4M3, (1, 32), (1, 32), True),
    ],
)
def test_a_watch_rounds_as_the_recipe_does_and_knows_the_layers_that_stay_out(
    monkeypatch: pytest.MonkeyPatch,
    recipe: Recipe,
    of_gradients: torch.dtype,
    tile: numerics.Tile | None,
    weight_tile: numerics.Tile | None,
    powers_of_two: bool,
) -> None:
    asked: set[tuple[Any, ...]] = set()

    def measure(tensor: Tensor, *how: Any) -> Rounding:
        asked.add((tuple(tensor.shape), *how))
        return Rounding()

    monkeypatch.setattr(numerics, "measure_rounding", measure)
    layers = nn.Sequential(*(Layer(number) for number in range(1, 5)))
    trunk = SimpleNamespace(decoder=SimpleNamespace(layers=layers), config=SimpleNamespace(num_layers=4))
    watch = LayerWatch(trunk, recipe)
    alone = cast(World, SimpleNamespace(gather=lambda item: [item]))
    with watch.watching(), torch.no_grad():
        layers(numbers(3, 8))
    assert watch.rows(alone) == [], "only an update is watched"
    with watch.watching():
        layers(numbers(3, 8)).sum().backward()
    operands = (((3, 8), E4M3, tile), ((8, 8), E4M3, weight_tile), ((3, 8), of_gradients, tile))
    assert asked == {(*operand, powers_of_two, None) for operand in operands}
    rows = watch.rows(alone)
    assert len(rows) == 4 * 4 * 3
    assert {(row["layer"], row["fp8"]) for row in rows} == {(0, False), (1, True), (2, True), (3, False)}
    with watch.watching():
        pass
    assert watch.rows(alone) == [], "each step is measured anew"
