"""FP8 as the benchmark emulates it: which numbers are rounded, how far, and where it is put in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.emulated_fp8 import MATRICES, Product, emulate, rounded, verdict


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float8_e4m3fn, 3), (torch.float8_e5m2, 2)])
def test_rounding_is_to_the_formats_bits_and_keeps_the_largest(dtype: torch.dtype, bits: int) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    near = rounded(tensor, dtype)
    large = tensor.abs() > 0.05
    errors = ((near - tensor).abs() / tensor.abs())[large]
    assert 0.2 * 2 ** -(bits + 1) < errors.max() <= 2 ** -(bits + 1) * 1.001
    assert near.abs().max().item() == pytest.approx(tensor.abs().max().item())


def test_all_three_products_have_rounded_operands() -> None:
    draw = torch.Generator().manual_seed(1)
    x, weight, grad = (torch.randn(shape, generator=draw) for shape in ((2, 5, 8), (6, 8), (2, 5, 6)))
    x.requires_grad_()
    weight.requires_grad_()
    out = Product.apply(x, weight)
    out.backward(grad)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    near_x, near_weight, near_grad = rounded(x.detach(), e4m3), rounded(weight.detach(), e4m3), rounded(grad, e5m2)
    torch.testing.assert_close(out.detach(), near_x @ near_weight.T)
    torch.testing.assert_close(x.grad, near_grad @ near_weight)
    torch.testing.assert_close(weight.grad, torch.einsum("abo,abi->oi", near_grad, near_x))
    assert not torch.allclose(out.detach(), (x @ weight.T).detach(), rtol=1e-4)


def test_first_and_last_layer_are_left_out() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attention, self.mlp = nn.Module(), nn.Module()
            for name in MATRICES:
                room, matrix = name.split(".")
                setattr(getattr(self, room), matrix, nn.Linear(4, 4, bias=False))

    trunk = nn.Module()
    trunk.decoder = nn.Module()
    trunk.decoder.layers = nn.ModuleList(Layer() for _ in range(4))
    assert emulate(trunk) == 8
    x = torch.randn(3, 4)
    outs = [layer.mlp.linear_fc1(x) for layer in trunk.decoder.layers]
    assert [isinstance(out, tuple) for out in outs] == [False, True, True, False]


def test_a_mean_outside_of_the_seeds_is_seen() -> None:
    def run(value: float) -> list[dict[str, float]]:
        return [dict.fromkeys(("loss", "kl", "retry_success", "token_mult_prob_error"), value)] * 10

    fp32 = [run(1.0), run(2.0)]
    assert verdict(fp32, [run(1.5)])["loss"][0]["within"]
    assert not verdict(fp32, [run(2.5)])["loss"][0]["within"]
