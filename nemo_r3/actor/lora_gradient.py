"""Gradients of LoRA's factors from what a matrix reads and from the gradient of what it gives.

    y = x W^T, W = W0 + s B A       dA = s (dy B)^T x       dB = s dy^T (x A^T)

All products have `rank` rows or columns, so they cost next to nothing, and the gradient of W is never made: a backward
pass multiplies by each matrix once, where training all weights multiplies twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from nemo_r3.actor.numerics import read_by

Take = Callable[[Tensor, Tensor], None]
"""What is to happen with x [tokens, columns] and dy [tokens, rows]."""


def tap(part: nn.Module, take: Take) -> None:
    """Has every backward pass through a linear layer call `take`.

    Args:
        part: megatron-core's, with or without Transformer Engine.
        take: called with what the matrix reads, this rank's part of it as it is before sequence parallelism gathers it,
            and the gradient of the output.
    """

    def on_forward(_: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor | None]) -> Any:
        output, bias = outputs
        return _Tap.apply(output, inputs[0], part, take), bias

    part.register_forward_hook(on_forward)


class _Tap(torch.autograd.Function):
    """The identity of a layer's output, which keeps the layer's input until its own backward pass, and no longer.

    A folded norm is made again, since what it gave is as large as its input, which is kept anyway.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, part: nn.Module, take: Take) -> Tensor:
        ctx.save_for_backward(x)
        ctx.part, ctx.take = part, take
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (dy,), (x,) = gradients, ctx.saved_tensors
        ctx.take(read_by(ctx.part, x).flatten(0, 1), dy.flatten(0, 1))
        return dy, None, None, None


def gradients(x: Tensor, a: Tensor, b: Tensor, dy: Tensor, cut: int, sequence_parallel: bool) -> tuple[Tensor, Tensor]:
    """dA [rank, columns] and dB [rows, rank] for s = 1, of this rank's parts, in the dtype of x and dy.

    Of the factor that tensor parallelism cuts it is the whole gradient, of the other one this rank's share.

    Args:
        x: [tokens, columns].
        a: [rank, columns], of any dtype.
        b: [rows, rank], of any dtype.
        dy: [tokens, rows].
        cut: the axis of [rows, columns] that tensor parallelism cuts.
        sequence_parallel: whether the tokens of x (cut 0) or of dy (cut 1) are this rank's alone.
    """
    down, up = x @ a.to(x.dtype).t(), dy @ b.to(dy.dtype)
    if sequence_parallel and cut == 0:
        down, up = gather_from_sequence_parallel_region(down), reduce_scatter_to_sequence_parallel_region(up)
    elif sequence_parallel:
        down, up = reduce_scatter_to_sequence_parallel_region(down), gather_from_sequence_parallel_region(up)
    return up.t() @ x, dy.t() @ down
