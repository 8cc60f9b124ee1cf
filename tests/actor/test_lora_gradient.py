from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, rms_norm
from torch.utils.flop_counter import FlopCounterMode

from nemo_r3.actor.lora_gradient import gradients, tap

TOKENS, COLUMNS, ROWS, RANK = 7, 48, 40, 2


class Layer(nn.Module):
    """As megatron-core's layers are called, with or without the norm that Transformer Engine's have folded in."""

    eps = 1e-2

    def __init__(self, folded: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(ROWS, COLUMNS)), torch.randn(ROWS)
        if folded:
            self.layer_norm_weight = nn.Parameter(torch.rand(COLUMNS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        norm = getattr(self, "layer_norm_weight", None)
        read = x if norm is None else rms_norm(x, norm.shape, norm, self.eps)
        return linear(read, self.weight), self.bias


@pytest.mark.parametrize("folded", [False, True])
def test_the_factors_gradients_are_those_that_the_weights_gradient_gives(folded: bool) -> None:
    torch.manual_seed(0)
    layer, x = Layer(folded), torch.randn(TOKENS, 1, COLUMNS, requires_grad=True)
    a, b = torch.randn(RANK, COLUMNS), torch.randn(ROWS, RANK)
    layer(x)[0].sin().sum().backward()
    whole, before = layer.weight.grad, x.grad
    assert whole is not None
    layer.requires_grad_(False)
    found: list[Any] = []
    tap(layer, lambda x, dy: found.extend(gradients(x, a, b, dy, cut=0, sequence_parallel=False)))
    again = x.detach().requires_grad_()
    output, bias = layer(again)
    assert bias is layer.bias
    output.sin().sum().backward()
    torch.testing.assert_close(found, [b.t() @ whole, whole @ a.t()])
    torch.testing.assert_close(again.grad, before, rtol=0, atol=0)


def test_a_backward_pass_in_bf16_multiplies_by_the_weight_once() -> None:
    layer = Layer(folded=False).requires_grad_(False).bfloat16()
    x = torch.randn(TOKENS, 1, COLUMNS, dtype=torch.bfloat16, requires_grad=True)
    a, b = torch.randn(RANK, COLUMNS), torch.randn(ROWS, RANK)
    tap(layer, lambda x, dy: gradients(x, a, b, dy, cut=0, sequence_parallel=False) and None)
    output, _ = layer(x)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    thin = 2 * 2 * TOKENS * RANK * (COLUMNS + ROWS)
    assert counter.get_total_flops() == 2 * TOKENS * COLUMNS * ROWS + thin


def test_a_layers_input_is_freed_as_soon_as_it_has_been_used() -> None:
    """So a backward pass holds the less the further it is, though its graph lives to its end."""
    first, second = (Layer(folded=False).requires_grad_(False) for _ in range(2))
    freed: list[bool] = []
    tap(first, lambda x, dy: freed.append(held() is None))
    tap(second, lambda x, dy: freed.append(held() is None))
    between = pad(first(torch.randn(TOKENS, 1, COLUMNS, requires_grad=True))[0], (0, COLUMNS - ROWS))
    held = weakref.ref(between)
    output, _ = second(between)
    del between
    output.sum().backward()
    assert freed == [False, True]
