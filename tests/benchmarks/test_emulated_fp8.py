"""FP8 as the benchmark emulates it: which numbers are rounded, how far, and where it is put in."""

from __future__ import annotations

import pytest
import torch
from layers import Layer
from torch import nn

from benchmarks.emulated_fp8 import METRICS, Emulation, Product, emulate, rounded, verdict
from nemo_r3.precision import BLOCKWISE, TENSORWISE, Recipe


@pytest.mark.parametrize("recipe", [TENSORWISE, BLOCKWISE])
def test_all_three_products_have_rounded_operands(recipe: Recipe) -> None:
    draw = torch.Generator().manual_seed(1)
    x, weight, grad = (torch.randn(shape, generator=draw) for shape in ((2, 5, 8), (6, 8), (2, 5, 6)))
    x.requires_grad_()
    weight.requires_grad_()
    out = Product.apply(x, weight, recipe)
    out.backward(grad)
    e4m3 = torch.float8_e4m3fn
    of_grad = torch.float8_e5m2 if recipe is TENSORWISE else e4m3
    near_weight = rounded(weight.detach(), e4m3, recipe.weight_tile)
    torch.testing.assert_close(out.detach(), rounded(x.detach(), e4m3, recipe.tile) @ near_weight.T)
    torch.testing.assert_close(x.grad, rounded(grad, of_grad, recipe.tile) @ near_weight)
    columns = None if recipe.tile is None else (128, 1)  # what is summed are tokens
    flat_x, flat_grad = x.detach().flatten(0, 1), grad.flatten(0, 1)
    near_x, near_grad = rounded(flat_x, e4m3, columns), rounded(flat_grad, of_grad, columns)
    torch.testing.assert_close(weight.grad, near_grad.T @ near_x)
    assert not torch.allclose(out.detach(), (x @ weight.T).detach(), rtol=1e-4)


def test_first_and_last_layer_are_left_out() -> None:
    trunk = nn.Module()
    trunk.decoder = nn.Module()
    trunk.decoder.layers = nn.ModuleList(Layer(number) for number in range(1, 5))
    emulation = Emulation(TENSORWISE)
    assert emulate(trunk, emulation) == 8
    x = torch.randn(3, 8)
    outs = [layer.mlp.linear_fc1(x) for layer in trunk.decoder.layers]
    assert [isinstance(out, tuple) for out in outs] == [False, True, True, False]
    emulation.exact = True
    matrix = trunk.decoder.layers[1].mlp.linear_fc1
    torch.testing.assert_close(matrix(x)[0], x @ matrix.weight.T)
    assert not torch.allclose(outs[1][0], x @ matrix.weight.T, rtol=1e-4)


def test_a_mean_outside_of_the_seeds_is_seen() -> None:
    def run(value: float) -> list[dict[str, float]]:
        return [dict.fromkeys(METRICS, value)] * 10

    fp32 = [run(1.0), run(2.0)]
    assert verdict(fp32, [run(1.5)])["loss"][0]["within"]
    assert not verdict(fp32, [run(2.5)])["loss"][0]["within"]
