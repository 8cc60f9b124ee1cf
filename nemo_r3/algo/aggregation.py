"""How tokens share a step's loss, and what is left of the shares once tokens are rejected.

`token_weights` knows the whole step and carries its denominators. Rejection is seen one microbatch at a time: within a
sequence the weights are mended at once (`kept_weights`), the step's denominators at its end, when every microbatch of
every rank has told its `denominators`: loss and gradient times sum(counted) / sum(kept).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor


class Aggregation(StrEnum):
    """The weight of a token of sequence i, of N sequences with len_i trained tokens each."""

    SEQUENCE_MEAN = "sequence_mean"  # 1 / (N * len_i): mean over sequences of the mean over tokens
    TOKEN_MEAN = "token_mean"  # 1 / sum of len_i: mean over all tokens
    SEQUENCE_SUM = "sequence_sum"  # 1 / N: mean over sequences of the sum over tokens
    LIMIT_MEAN = "limit_mean"  # 1 / (N * limit): that sum, divided by the longest length allowed


def token_weights(lengths: Sequence[int], kind: Aggregation, limit: int) -> list[float]:
    """The weight of each token of each sequence in a step's loss.

    Args:
        lengths: [sequences] trained tokens of each, at least 1.
        kind: how they share.
        limit: the most trained tokens that a sequence can have; LIMIT_MEAN alone divides by it.

    Returns:
        [sequences] the weight that all tokens of the sequence have.
    """
    if kind == Aggregation.SEQUENCE_MEAN:
        return [1 / (len(lengths) * length) for length in lengths]
    if kind == Aggregation.TOKEN_MEAN:
        total = sum(lengths)
        return [1 / total for _ in lengths]
    if kind == Aggregation.SEQUENCE_SUM:
        return [1 / len(lengths) for _ in lengths]
    return [1 / (len(lengths) * limit) for _ in lengths]


Kept = Tensor | slice
"""Which tokens are left: [tokens] bool, or `EVERY`; both pick them by indexing."""
EVERY = slice(None)
"""All of them, without asking: to index by a mask, the host waits until the device has computed it."""


def kept_weights(weights: Tensor, kept: Kept, sequences: Tensor, kind: Aggregation) -> Tensor:
    """Weights of the kept tokens, as if the rejected ones of their sequences had never been.

    Args:
        weights: [tokens] of `token_weights`.
        kept: which are.
        sequences: [tokens] int64, never decreasing.
        kind: how the weights were made.

    Returns:
        [kept], in order; exact up to the factor sum(counted) / sum(kept) of `denominators`.
    """
    if isinstance(kept, slice) or kind != Aggregation.SEQUENCE_MEAN:
        return weights[kept]
    return weights[kept] / sequence_means(kept.to(weights.dtype), sequences)[kept]


def denominators(kept: Kept, sequences: Tensor, kind: Aggregation) -> tuple[Tensor, Tensor]:
    """This microbatch's part of the step's denominator, (before, after) its rejected tokens are taken out.

    Tokens for TOKEN_MEAN; for the others sequences, which leave when none of their tokens is kept.
    """
    of = _tokens if kind == Aggregation.TOKEN_MEAN else _runs
    return of(sequences), of(sequences[kept])


def _tokens(sequences: Tensor) -> Tensor:
    return sequences.new_full((), len(sequences))


def _runs(sequences: Tensor) -> Tensor:
    return (sequences.diff() != 0).sum() + bool(len(sequences))


def sequence_means(values: Tensor, sequences: Tensor) -> Tensor:
    """At each token the mean over its sequence's tokens; summed in a fixed order, so alike on every rank.

    Args:
        values: [tokens] float.
        sequences: [tokens] int64, never decreasing.

    Returns:
        [tokens] of the type of `values`, with gradient.
    """
    if not len(values):
        return values
    _, places, lengths = torch.unique_consecutive(sequences, return_inverse=True, return_counts=True)
    return torch.segment_reduce(values, "mean", lengths=lengths)[places]
