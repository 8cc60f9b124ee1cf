"""How tokens share an update's loss, and how the shares change when tokens are rejected.

`token_weights` sees the whole update, so its weights carry the denominators. Rejection is known only per microbatch:
within a sequence the weights are corrected at once (`kept_weights`), but the update's denominators only at its end,
when the `denominators` of all microbatches and ranks are known: loss and gradient times sum(counted) / sum(kept).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor


class Aggregation(StrEnum):
    """The weight of a token of sequence i, among N sequences with len_i trained tokens each."""

    SEQUENCE_MEAN = "sequence_mean"  # 1 / (N * len_i): mean over sequences of the mean over tokens
    TOKEN_MEAN = "token_mean"  # 1 / sum of len_i: mean over all tokens
    SEQUENCE_SUM = "sequence_sum"  # 1 / N: mean over sequences of the sum over tokens
    LIMIT_MEAN = "limit_mean"  # 1 / (N * limit): that sum, divided by the longest length allowed


def token_weights(lengths: Sequence[int], kind: Aggregation, limit: int) -> list[float]:
    """The weight of each token of each sequence in an update's loss.

    Args:
        lengths: [sequences] trained tokens of each, at least 1.
        kind: how tokens share the loss.
        limit: the most trained tokens that a sequence can have; only LIMIT_MEAN uses it.

    Returns:
        [sequences] the weight of each token of the sequence.
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
"""Which tokens are not rejected: [tokens] bool, or `EVERY`; either is an index."""
EVERY = slice(None)
"""All of them; to index by a mask instead, the host would have to wait until the device has computed it."""


def kept_weights(weights: Tensor, kept: Kept, sequences: Tensor, kind: Aggregation) -> Tensor:
    """Weights of the kept tokens, as if the rejected ones of their sequences did not exist.

    Args:
        weights: [tokens] of `token_weights`.
        kept: which tokens are kept.
        sequences: [tokens] int64, never decreasing.
        kind: how the weights were made.

    Returns:
        [kept], in order; exact up to the factor sum(counted) / sum(kept) of `denominators`.
    """
    if isinstance(kept, slice) or kind != Aggregation.SEQUENCE_MEAN:
        return weights[kept]
    return weights[kept] / sequence_means(kept.to(weights.dtype), sequences)[kept]


def denominators(kept: Kept, sequences: Tensor, kind: Aggregation) -> tuple[Tensor, Tensor]:
    """This microbatch's part of the update's denominator, (with, without) its rejected tokens.

    TOKEN_MEAN counts tokens; the others count sequences, except those without any kept token.
    """
    of = _tokens if kind == Aggregation.TOKEN_MEAN else _runs
    return of(sequences), of(sequences[kept])


def _tokens(sequences: Tensor) -> Tensor:
    return sequences.new_full((), len(sequences))


def _runs(sequences: Tensor) -> Tensor:
    return (sequences.diff() != 0).sum() + bool(len(sequences))


def sequence_means(values: Tensor, sequences: Tensor) -> Tensor:
    """At each token, the mean over its sequence's tokens; summed in a fixed order, so the same on every rank.

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
