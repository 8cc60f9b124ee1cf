"""The LM head at trained positions: log-probabilities and entropies without a tensor of all tokens x vocabulary.

    hidden states at the sources --chunk by chunk--> logits of this rank's columns -> log-sum-exp over all ranks

Forward ends with the first chunk, the largest, and keeps its logits for backward, which recomputes the others: memory
does not grow with the number of tokens. Logits have the weights' dtype; all else is float32, and compiled on CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_r3.actor.fused import fused

CHUNK_ELEMENTS = {"cpu": 2**26, "cuda": 2**28}
"""Logits per chunk. On CUDA the weight's gradient is read and written once per chunk, so chunks are large there."""


@dataclass(frozen=True)
class Columns:
    """Which columns of the vocabulary this tensor-parallel rank holds, and the ranks that hold the others."""

    start: int  # its first column
    count: int  # number of its columns; further rows of the weight are padding
    group: dist.ProcessGroup | None  # the tensor-parallel ranks; None if there is only this one

    def reduce(self, tensor: Tensor, op: Any) -> None:
        """All-reduces over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, op, group=self.group)


def target_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, columns: Columns
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets under softmax(hidden @ weight.T / temperature), and its entropy.

    Args:
        hidden: [trained, hidden_size].
        weight: [vocabulary / tensor_parallel, hidden_size], this rank's rows.
        targets: [trained] int64.
        temperature: the rollout's.
        columns: of this rank.

    Returns:
        [trained] float32 log-probabilities with gradient, and [trained] float32 entropies (nats) without; the same on
        every tensor-parallel rank. The gradient of `hidden` is this rank's share, to be summed over the ranks.
    """
    outputs: tuple[Tensor, Tensor] = _TargetLogprobs.apply(hidden, weight, targets, temperature, columns)
    return outputs


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, columns: Columns
    ) -> tuple[Tensor, Tensor]:
        real = weight[: columns.count]
        local = targets - columns.start
        chunk = max(1, CHUNK_ELEMENTS[hidden.device.type] // len(weight))  # the same on every rank, as padding counts
        chunks = []
        for part, index in reversed(list(zip(hidden.split(chunk), local.split(chunk), strict=True))):
            logits = part @ real.t()
            chunks.append(_forward_chunk(logits, index, temperature, columns))
        logprobs, entropies, totals = (torch.cat(parts[::-1]) for parts in zip(*chunks, strict=True))
        ctx.save_for_backward(hidden, weight, local, totals, logits)
        ctx.temperature, ctx.columns, ctx.chunk = temperature, columns, chunk
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, totals, kept = ctx.saved_tensors
        real = weight[: ctx.columns.count]
        d_hidden = torch.empty_like(hidden)
        scales = -grads[0] / ctx.temperature
        pieces = list(zip(*(t.split(ctx.chunk) for t in (hidden, local, totals, scales, d_hidden)), strict=True))
        summed = len(pieces) > 1  # in float32; a single product needs no sum
        d_weight = None  # of a frozen head
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=torch.float32 if summed else weight.dtype)
        for number, (part, index, total, scale, d_part) in enumerate(pieces):
            logits = part @ real.t() if number else kept
            # d logprob / d logits = (one-hot - softmax) / temperature
            d_logits = fused(_softmax_times, logits)(logits, total, scale, ctx.temperature)
            held, places = _own_columns(index, ctx.columns)
            logprobs = logits.gather(1, places).float() / ctx.temperature - total[:, None]
            of_targets = (torch.expm1(logprobs) * scale[:, None]).to(d_logits.dtype)
            d_logits.scatter_(1, places, torch.where(held, of_targets, d_logits.gather(1, places)))
            torch.mm(d_logits, real, out=d_part)
            if d_weight is not None and summed:
                d_weight[: ctx.columns.count] += d_logits.t() @ part
            elif d_weight is not None:
                torch.mm(d_logits.t(), part, out=d_weight[: ctx.columns.count])
            del logits, d_logits  # before the next chunk's are made
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


def _forward_chunk(
    logits: Tensor, local: Tensor, temperature: float, columns: Columns
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and log-sum-exps [tokens] over all ranks, from logits [tokens, columns]."""
    held, places = _own_columns(local, columns)
    peak, total, weighted = fused(_softmax_sums, logits)(logits, temperature)
    largest = peak.clone()
    columns.reduce(largest, dist.ReduceOp.MAX)
    below = peak - largest
    own = logits.gather(1, places).float() / temperature - largest[:, None]
    sums = torch.stack((total, weighted + total * below, torch.where(held, own, 0)[:, 0]))
    sums[:2] *= below.exp()
    columns.reduce(sums, dist.ReduceOp.SUM)
    log_total = sums[0].log()
    return sums[2] - log_total, log_total - sums[1] / sums[0], largest + log_total


def _softmax_sums(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """[tokens] float32 each, of logits / temperature: the largest; without it, the sums of exp and of exp * logit."""
    scaled = logits.float() / temperature
    largest = scaled.amax(-1)
    scaled.sub_(largest[:, None])
    exponentials = scaled.exp()
    total = exponentials.sum(-1)
    return largest, total, exponentials.mul_(scaled).sum(-1)


def _softmax_times(logits: Tensor, total: Tensor, scale: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature) * scale in the logits' dtype, given their log-sum-exps."""
    scaled = (logits.float() / temperature).sub_(total[:, None])
    return scaled.exp_().mul_(scale[:, None]).to(logits.dtype)


def _own_columns(local: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """[tokens, 1] each: whether this rank has the target's column, and that column, clamped to a valid one otherwise.

    Nothing is filtered out: to select tokens by a mask, the host would have to wait for the device.
    """
    return ((local >= 0) & (local < columns.count))[:, None], local.clamp(0, columns.count - 1)[:, None]
