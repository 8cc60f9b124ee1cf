"""Variable-length attention that also returns its log-sum-exp, so that parts of one softmax can be merged.

All kernels take query [query tokens, heads, head_dim], key and value [key tokens, kv_heads, head_dim]; part i of the
queries attends to part i of the keys. The log-sum-exp (nats) is [heads, query tokens], float32. The gradient takes the
output and the log-sum-exp of the whole softmax and gives this part's share, as in ring attention (arXiv 2310.01889).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nemo_r3.algo.layout import Bounds


class Parts(NamedTuple):
    """Which queries attend to which keys."""

    queries: Bounds  # of the parts of the queries
    keys: Bounds  # of the parts of the keys, equally many
    causal: bool  # whether query j of a part sees only its keys 0..j


class Kernel(Protocol):
    """An implementation of variable-length attention."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
        """Output [query tokens, heads, head_dim] and log-sum-exp."""
        ...

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, parts: Parts
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value; `out` and `lse` may be those of a softmax over more keys than these."""
        ...


def kernel_for(query: Tensor) -> Kernel:
    """The fastest kernel for a tensor's device and dtype."""
    if query.device.type == "cpu":
        return CpuFlash()
    return CudaFlash() if query.dtype is torch.bfloat16 else Plain()


class CpuFlash:
    """The operator behind torch's SDPA on a CPU, a call per batch of parts."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = torch.empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
        for queries, keys in _batches(parts):
            batch = run(_take(query, queries), _take(key, keys), _take(value, keys), 0.0, parts.causal)
            _put(batch[0], out, queries)
            _put(batch[1], lse, queries)
        return out, lse.t()

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, parts: Parts
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
        for queries, keys in _batches(parts):
            g, q, o, s = (_take(tensor, queries) for tensor in (grad, query, out, lse.t()))
            k, v = _take(key, keys), _take(value, keys)
            if isinstance(queries, Batch):
                g = g * queries.inside[:, None, :, None]
            # the operator is parallel over parts and key/value heads
            too_few = len(k) * k.shape[1] < torch.get_num_threads()
            if too_few:
                k, v = _per_head(k, q), _per_head(v, q)
            computed = run(g, q, k, v, o, s.contiguous(), 0.0, parts.causal)
            for gradient, into, batch in zip(computed, gradients, (queries, keys, keys), strict=True):
                _put(_per_kv_head(gradient, into) if too_few else gradient, into, batch)
        return gradients[0], gradients[1], gradients[2]


LENGTH_STEP = 8
"""Parts whose lengths round up to the same multiple of this are batched together."""


@dataclass(frozen=True)
class Batch:
    """Parts of similar length, side by side."""

    places: Tensor  # [parts, longest] int64, each token's place; the last one is repeated after a part's end
    inside: Tensor  # [parts, longest] bool, False after a part's end


def _batches(parts: Parts) -> Iterator[tuple[slice | Batch, slice | Batch]]:
    """The queries and keys of each call; only under a causal mask may parts be padded, and so batched."""
    if parts.causal:
        return zip(_alike(parts.queries), _alike(parts.keys), strict=True)
    return ((slice(*query), slice(*key)) for query, key in zip(parts.queries.spans, parts.keys.spans, strict=True))


@lru_cache(8)  # every layer of a microbatch asks for the same
def _alike(bounds: Bounds) -> list[slice | Batch]:
    """All parts, batched by length; a part without others of its length is a slice."""
    spans: dict[int, list[tuple[int, int]]] = {}
    for start, end in bounds.spans:
        spans.setdefault(-(-(end - start) // LENGTH_STEP), []).append((start, end))
    return [slice(*some[0]) if len(some) == 1 else _side_by_side(some) for some in spans.values()]


def _side_by_side(spans: list[tuple[int, int]]) -> Batch:
    starts, ends = torch.tensor(spans)[..., None].unbind(1)
    places = starts + torch.arange(int((ends - starts).max()))
    return Batch(places.minimum(ends - 1), places < ends)


def _take(tensor: Tensor, batch: slice | Batch) -> Tensor:
    """[tokens, heads, ...] -> [parts, heads, longest, ...]."""
    picked = tensor[batch][None] if isinstance(batch, slice) else tensor[batch.places]
    return picked.transpose(1, 2)


def _put(values: Tensor, into: Tensor, batch: slice | Batch) -> None:
    """Writes [parts, heads, longest, ...] to their places in [tokens, heads, ...]."""
    rows = values.transpose(1, 2)
    if isinstance(batch, slice):
        into[batch] = rows[0]
    else:
        into[batch.places[batch.inside]] = rows[batch.inside]


class CudaFlash:
    """torch's FlashAttention (arXiv 2307.08691), one call for all parts; bfloat16 only."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(query, key, value, *_flash_arguments(parts), False)
        return out, lse

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, parts: Parts
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        grad, lse = grad.contiguous(), lse.contiguous()
        no_dropout = [torch.empty(shape, dtype=torch.uint64, device=query.device) for shape in ((2,), ())]
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            grad, query, key, value, out, lse, *_flash_arguments(parts), *no_dropout
        )
        return gradients


def _flash_arguments(parts: Parts) -> tuple[Tensor, Tensor, int, int, float, bool]:
    """Bounds, longest parts, dropout and mask, as both directions take them."""
    queries, keys = parts.queries, parts.keys
    return queries.tensor, keys.tensor, queries.longest, keys.longest, 0.0, parts.causal


class Plain:
    """The formulas as they stand, for any device and dtype; slow, but the others are tested against it."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        outputs, sums = [], []
        for (q,), (k, v) in zip(_cut(parts.queries, query), _cut(parts.keys, key, value), strict=True):
            scores = _scores(q, k, parts.causal)
            sums.append(scores.logsumexp(-1).squeeze(0))
            outputs.append(torch.softmax(scores, -1) @ _per_head(v, q))
        return _join(outputs), torch.cat(sums, -1)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, parts: Parts
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        queries, keys = _cut(parts.queries, grad, query, out, lse.t()[..., None]), _cut(parts.keys, key, value)
        gradients = []
        for (g, q, o, s), (k, v) in zip(queries, keys, strict=True):
            probabilities = torch.exp(_scores(q, k, parts.causal) - s)
            inner = g @ _per_head(v, q).transpose(-1, -2) - (g * o).sum(-1, keepdim=True)
            scored = probabilities * inner / math.sqrt(q.shape[-1])
            d_key = _per_kv_head(scored.transpose(-1, -2) @ q, k)
            d_value = _per_kv_head(probabilities.transpose(-1, -2) @ g, v)
            gradients.append((scored @ _per_head(k, q), d_key, d_value))
        d_queries, d_keys, d_values = (_join(list(parts)) for parts in zip(*gradients, strict=True))
        return d_queries, d_keys, d_values


def _cut(bounds: Bounds, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Of each part, [1, heads, tokens of the part, channels] views of tensors [tokens, heads, channels]."""
    for start, end in bounds.spans:
        yield [tensor[start:end].transpose(0, 1)[None] for tensor in tensors]


def _join(pieces: list[Tensor]) -> Tensor:
    """[1, heads, tokens of the part, head_dim] each -> [tokens, heads, head_dim]."""
    return torch.cat([piece.squeeze(0).transpose(0, 1) for piece in pieces])


def _per_head(tensor: Tensor, query: Tensor) -> Tensor:
    """Repeats key/value heads for the query heads that share them."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1)


def _per_kv_head(tensor: Tensor, key: Tensor) -> Tensor:
    """Sums over the query heads that share a key/value head."""
    return tensor.unflatten(1, (key.shape[1], -1)).sum(2)


def _scores(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    scores = query @ _per_head(key, query).transpose(-1, -2) / math.sqrt(query.shape[-1])
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores
