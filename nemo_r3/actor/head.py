"""The head on trained positions: log-probabilities and entropies without a tensor of all tokens x vocabulary.

    hidden states at the sources --chunk by chunk--> logits of this rank's columns -> log-sum-exp over all ranks

Backward keeps the last chunk's logits and computes the others anew: memory does not grow with the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 2**26
"""Logits of one chunk: 256 MiB in float32."""


@dataclass(frozen=True)
class Columns:
    """Which columns of the vocabulary this tensor-parallel rank holds, and the ranks that hold the others.

    Attributes:
        start: its first column.
        count: its real columns; rows of the weight beyond are padding.
        group: the tensor-parallel ranks; None where there is only this one.
    """

    start: int
    count: int
    group: dist.ProcessGroup | None

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
    found: tuple[Tensor, Tensor] = _TargetLogprobs.apply(hidden, weight, targets, temperature, columns)
    return found


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return (hidden @ weight.t()).float().div_(temperature)


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, columns: Columns
    ) -> tuple[Tensor, Tensor]:
        real = weight[: columns.count]
        local = targets - columns.start
        chunk = max(1, CHUNK_ELEMENTS // max(1, columns.count))
        found = []
        for part, index in zip(hidden.split(chunk), local.split(chunk), strict=True):
            logits = _logits(part, real, temperature)
            found.append(_forward_chunk(logits, index, columns))
        totals = [total + largest for _, _, total, largest in found]
        totals[-1] = found[-1][2]  # the last chunk's logits are kept, and are less by the largest
        ctx.save_for_backward(hidden, weight, local, torch.cat(totals), logits)
        ctx.temperature, ctx.columns, ctx.chunk = temperature, columns, chunk
        logprobs, entropies = torch.cat([one[0] for one in found]), torch.cat([one[1] for one in found])
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, totals, kept = ctx.saved_tensors
        real = weight[: ctx.columns.count]
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        pieces = list(zip(*(t.split(ctx.chunk) for t in (hidden, local, totals, grads[0], d_hidden)), strict=True))
        for number, (part, index, total, grad, d_part) in enumerate(pieces):
            # d logprob / d logits = (one-hot - softmax) / temperature
            logits = kept if number + 1 == len(pieces) else _logits(part, real, ctx.temperature)
            d_logits = logits.sub_(total[:, None]).exp_()
            rows, places = _held(index, ctx.columns)
            d_logits[rows, places] -= 1
            d_logits.mul_(-grad[:, None] / ctx.temperature)
            d_logits = d_logits.to(part.dtype)
            torch.mm(d_logits, real, out=d_part)
            d_weight[: ctx.columns.count] += d_logits.t() @ part
        return d_hidden, d_weight.to(weight.dtype), None, None, None


def _forward_chunk(logits: Tensor, local: Tensor, columns: Columns) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a chunk of logits [tokens, columns]: log-probabilities, entropies, log-sum-exps and largest logits.

    Takes the largest logit off the logits, and off the log-sum-exps that it returns.
    """
    rows, places = _held(local, columns)
    sums = logits.new_zeros(3, len(logits))  # of exp, of exp * logit, and the target's logit
    largest = logits.amax(-1)
    columns.reduce(largest, dist.ReduceOp.MAX)
    logits.sub_(largest[:, None])
    sums[2, rows] = logits[rows, places]
    exponentials = logits.exp()
    sums[0] = exponentials.sum(-1)
    sums[1] = torch.linalg.vecdot(exponentials, logits)
    columns.reduce(sums, dist.ReduceOp.SUM)
    log_total = sums[0].log()
    return sums[2] - log_total, log_total - sums[1] / sums[0], log_total, largest


def _held(local: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """Rows whose target is among this rank's columns, and the columns."""
    rows = ((local >= 0) & (local < columns.count)).nonzero()[:, 0]
    return rows, local[rows]
