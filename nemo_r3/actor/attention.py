"""Core attention of every layer: exact attention over packed rows that hold a group's context only once.

1. Every context, branch and whole sequence attends to itself, causally.
2. The branches attend to all of their context: all branches of a group in one call, without a mask.
3. The two results are merged into one softmax by their log-sum-exps.

The context's keys are read once per group, and there is no mask of queries x keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_r3.actor.fused import fused
from nemo_r3.actor.kernels import Parts, kernel_for
from nemo_r3.actor.rotary import Rotary
from nemo_r3.algo.layout import Layout


@dataclass(kw_only=True)
class Packed(PackedSeqParams):
    """What megatron-core hands to every layer, and to its core attention beside query, key and value."""

    layout: Layout  # of the microbatch
    cos: Tensor  # [tokens, 1, rotary channels / 2] of each token's rotary angles
    sin: Tensor  # the same
    routed_experts: Tensor | None = None  # of the microbatch, for the routers


def packed(layout: Layout, rotary: Rotary, dtype: torch.dtype, routed_experts: Tensor | None = None) -> Packed:
    """The `Packed` of a microbatch with this layout."""
    cos, sin = rotary.waves(layout.positions, dtype)
    return Packed(qkv_format="thd", layout=layout, cos=cos, sin=sin, routed_experts=routed_experts)


class SharedContextAttention(nn.Module):
    """Rotary positions, except in layers without any, then attention in the layout of a microbatch.

    Takes query [tokens, heads, head_dim] and key, value [tokens, kv_heads, head_dim] of this tensor-parallel rank,
    and `Packed`; returns [tokens, heads * head_dim].
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.rotates = not config.no_rope_freq[layer_number - 1]  # of all stages' layers, counted from 1

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Packed, **__: Any
    ) -> Tensor:
        """Attends; see the class for shapes."""
        layout, cos, sin = packed_seq_params.layout, packed_seq_params.cos, packed_seq_params.sin
        if not self.rotates:
            cos, sin = cos[..., :0], sin[..., :0]
        return _SharedContext.apply(query, key, value, cos, sin, layout).flatten(1)


class _SharedContext(torch.autograd.Function):
    """One operation, so that only the rotated query and key, the value and the output are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, layout: Layout
    ) -> Tensor:
        kernel = kernel_for(query)
        own, across = _own_and_across(layout)
        query, key, value = rotate(query, cos, sin), rotate(key, cos, sin), value.contiguous()
        out, lse = kernel.forward(query, key, value, own)
        if layout.shared:
            branch, context = layout.branch_tokens, layout.context_tokens
            to_context = kernel.forward(query[branch], key[context], value[context], across)
            out[branch], lse[:, branch] = fused(merge, out)((out[branch], lse[:, branch]), to_context)
        ctx.save_for_backward(query, key, value, cos, sin, out, lse)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        query, key, value, cos, sin, out, lse = ctx.saved_tensors
        layout, kernel = ctx.layout, kernel_for(query)
        own, across = _own_and_across(layout)
        d_query, d_key, d_value = kernel.backward(grad, query, key, value, out, lse, own)
        if layout.shared:
            branch, context = layout.branch_tokens, layout.context_tokens
            to_context = kernel.backward(
                grad[branch], query[branch], key[context], value[context], out[branch], lse[:, branch], across
            )
            d_query[branch] += to_context[0]
            d_key[context] += to_context[1]
            d_value[context] += to_context[2]
        return rotate(d_query, cos, -sin), rotate(d_key, cos, -sin), d_value, None, None, None


def _own_and_across(layout: Layout) -> tuple[Parts, Parts]:
    """Every part with itself; each group's branches with their context."""
    return Parts(layout.parts, layout.parts, causal=True), Parts(layout.branches, layout.contexts, causal=False)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first channels of each head [tokens, heads, head_dim] by the tokens' angles, in two halves.

    Linear in `heads`; with -sin it is the transpose, and so the gradient. The result is contiguous.
    """
    half = cos.shape[-1]
    if not half:
        return heads.contiguous()
    if heads.is_cuda:
        return fused(_rotated, heads)(heads, cos, sin)
    halves = [half, half, heads.shape[-1] - 2 * half]
    rotated = torch.empty_like(heads, memory_format=torch.contiguous_format)
    (first, second, rest), into = heads.split(halves, -1), rotated.split(halves, -1)
    torch.mul(first, cos, out=into[0]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=into[1]).addcmul_(first, sin)
    into[2].copy_(rest)
    return rotated


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` for torch.compile, without writes into parts of a tensor."""
    half = cos.shape[-1]
    first, second, rest = heads.split([half, half, heads.shape[-1] - 2 * half], -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merges attention over two disjoint sets of keys into attention over both.

    Args:
        one: output [tokens, heads, head_dim] and log-sum-exp [heads, tokens].
        other: the same queries over other keys.
    """
    lse = torch.logaddexp(one[1], other[1])
    first, second = (torch.exp(part - lse).t()[..., None].to(one[0].dtype) for _, part in (one, other))
    return (one[0] * first).addcmul_(other[0], second), lse
