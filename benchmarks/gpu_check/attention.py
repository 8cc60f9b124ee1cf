"""Attention over a shared context: the actor's kernels against one masked softmax, and against FlexAttention.

    masked  every token against every other with a mask, float32: slow, and what the others are compared with
    actor   what `actor.attention` runs on this device
    flex    torch's FlexAttention with the same mask as blocks, compiled; CUDA only

All without rotary positions. Errors are relative Frobenius norms of output and gradients, at a size whose mask fits;
times are medians of forward and backward at the size of an update.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check import command_line
from benchmarks.update import Point, rows_of
from nemo_r3.actor.attention import Packed, SharedContextAttention
from nemo_r3.algo.layout import Layout
from nemo_r3.algo.packing import pack

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query [tokens, heads, dim], key and value [tokens, kv_heads, dim] -> [tokens, heads * dim]."""


@dataclass(frozen=True)
class Heads:
    """Of one layer."""

    query: int
    key: int
    dim: int


LLAMA_8B, TINY = Heads(32, 8, 128), Heads(4, 2, 32)
PARITY, SPEED, SMALL = Point(256, 64, 4, 2), Point(1024, 128, 8, 4), Point(24, 8, 3, 2)
ROUNDS = 10


def layout_of(point: Point, device: torch.device) -> Layout:
    """One microbatch of all the point's groups."""
    rows = rows_of(point, 512)
    pieces = [range(first, first + point.group) for first in range(0, len(rows), point.group)]
    return pack(rows, pieces, 1).to(device).layout


def labels(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """[tokens] int64 each: a token's part; its family if it is in a branch, else -1; in a context, else -2."""
    part = torch.full_like(layout.positions, 0)
    branch, context = torch.full_like(part, -1), torch.full_like(part, -2)
    for number, (start, end) in enumerate(layout.parts.spans):
        part[start:end] = number
    for number, (keys, queries) in enumerate(zip(layout.contexts.spans, layout.branches.spans, strict=True)):
        context[layout.context_tokens][slice(*keys)] = number
        branch[layout.branch_tokens][slice(*queries)] = number
    return part, branch, context


def mask_of(layout: Layout) -> Tensor:
    """[tokens, tokens] bool: whether the query of a row sees the key of a column."""
    part, branch, context = labels(layout)
    return (part[:, None] == part).tril() | (branch[:, None] == context)


def actor(layout: Layout, like: Tensor) -> Attend:
    """The actor's own, with angles of zero."""
    still = like.new_zeros(layout.positions.numel(), 1, like.shape[-1] // 2)
    params = Packed(qkv_format="thd", layout=layout, cos=still + 1, sin=still)
    config: Any = SimpleNamespace(no_rope_freq=[0])
    attention = SharedContextAttention(config, 1)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = attention(query, key, value, None, packed_seq_params=params)
        return out

    return attend


def masked(layout: Layout) -> Attend:
    """One softmax under a mask."""
    mask = mask_of(layout)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        share = query.shape[1] // key.shape[1]
        keys, values = (tensor.repeat_interleave(share, 1) for tensor in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, keys) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)

    return attend


def flex(layout: Layout) -> Attend:
    """FlexAttention, compiled for this layout."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    part, branch, context = labels(layout)
    tokens = part.numel()

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ((part[query] == part[key]) & (query >= key)) | (branch[query] == context[key])

    blocks = create_block_mask(sees, None, None, tokens, tokens, device=str(part.device))
    compiled = torch.compile(flex_attention)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        out: Tensor = compiled(*heads, block_mask=blocks, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)

    return attend


def draws(tokens: int, heads: Heads, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the output's gradient [tokens, heads * dim]."""
    draw = torch.Generator().manual_seed(1)
    shapes = [(tokens, count, heads.dim) for count in (heads.query, heads.key, heads.key)]
    found = [torch.randn(shape, generator=draw) for shape in (*shapes, (tokens, heads.query * heads.dim))]
    return [tensor.to(device, dtype) for tensor in found]


def both_ways(attend: Attend, tensors: list[Tensor]) -> list[Tensor]:
    """Output and the gradients of query, key and value."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, tensors[3])]


def errors(attend: Attend, reference: Attend, tensors: list[Tensor]) -> float:
    """The largest relative error among output and gradients, against the reference in float32."""
    ours, theirs = both_ways(attend, tensors), both_ways(reference, [tensor.float() for tensor in tensors])
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def seconds(attend: Attend, tensors: list[Tensor], rounds: int) -> float:
    """Median of forward and backward, after a first that is not counted."""
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        both_ways(attend, tensors)
        if tensors[0].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def measure(device: torch.device, small: bool) -> dict[str, float]:
    """`error_*` and `ms_*` of each way that this device has."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = TINY if small else LLAMA_8B
    found: dict[str, float] = {}
    for key, point in (("error", SMALL if small else PARITY), ("ms", SMALL if small else SPEED)):
        layout = layout_of(point, device)
        tensors = draws(layout.positions.numel(), heads, device, dtype)
        ways = {"actor": actor(layout, tensors[0])} | ({"flex": flex(layout)} if device.type == "cuda" else {})
        for name, attend in ways.items():
            if key == "error":
                found[f"error_{name}"] = errors(attend, masked(layout), tensors)
            else:
                found[f"ms_{name}"] = 1000 * seconds(attend, tensors, ROUNDS)
    return found


def main() -> None:
    """Writes what was found as JSON."""
    options = command_line(__doc__).parse_args()
    options.out.write_text(json.dumps(measure(torch.device(options.device), options.small)))


if __name__ == "__main__":
    main()
