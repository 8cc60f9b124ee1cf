"""The mismatch between vLLM, which samples, and the actor, which trains: measured, and on request corrected.

`log_ratio` is log(p_actor / p_vllm) of each sampled token, [tokens], without gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_r3.algo.aggregation import EVERY, Kept, sequence_means

BOUNDS = {"none": (0.0, math.inf), "tis": (0.0, 2.0), "icepop": (0.5, 5.0), "sequence_mask": (0.99, 1.01)}
"""Each correction's own `algo.mismatch_low` and `algo.mismatch_high`."""

OUTLIER = (0.5, 2.0)
"""An importance ratio beyond these is an outlier, whatever the correction."""

LOG_RATIO_LIMIT = 20.0
"""Ratios stay within e^-20 and e^20 (verl's limit): beyond any useful token's, and short of float32's overflow."""


def ratios(log_ratio: Tensor) -> Tensor:
    """Importance ratios of tokens; their mean is 1 where both are the same policy."""
    return torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def prob_error(log_ratio: Tensor) -> Tensor:
    """exp|log_ratio| at each token; its mean is `token_mult_prob_error` (NeMo-RL's name)."""
    return ratios(log_ratio.abs())


def rollout_kl(log_ratio: Tensor) -> Tensor:
    """An unbiased, non-negative estimate of KL(rollout || actor) at each token (k3, http://joschu.net/blog/kl-approx.html).

    The tokens are the rollout's samples: ratio - 1 - log ratio.
    """
    return ratios(log_ratio) - 1 - log_ratio


def outside(log_ratio: Tensor) -> Tensor:
    """[tokens] bool: the ratio is beyond `OUTLIER`, or NaN."""
    return ~((log_ratio >= math.log(OUTLIER[0])) & (log_ratio <= math.log(OUTLIER[1])))


def correct(log_ratio: Tensor, sequences: Tensor, kind: str, low: float, high: float) -> tuple[Tensor, Kept]:
    """Importance-sampling factors of the policy loss at each token.

    - "none": the factor is 1.
    - "tis": the factor is min(ratio, high) (https://fengyao.notion.site/off-policy-rl).
    - "icepop": the factor is the ratio; a token is rejected unless low <= ratio <= high (arXiv 2510.18855).
    - "sequence_mask": the factor is the ratio; a sequence is rejected unless the geometric mean of its tokens'
      ratios is within low and high.

    Bounds are compared as logarithms, which never overflow. NaN is kept, so that it stops the step.

    Args:
        log_ratio: [tokens] float.
        sequences: [tokens] int64, never decreasing.
        kind: `algo.mismatch_correction`.
        low: above 0; "none" and "tis" ignore it.
        high: above low.

    Returns:
        Factors [tokens], and which tokens are kept.
    """
    ratio = ratios(log_ratio)
    if kind == "none":
        return torch.ones_like(ratio), EVERY
    if kind == "tis":
        return ratio.clamp(max=high), EVERY
    if kind == "icepop":
        return ratio, _within(log_ratio, low, high)
    return ratio, _within(sequence_means(log_ratio, sequences), low, high)


def _within(log_ratio: Tensor, low: float, high: float) -> Tensor:
    return ~((log_ratio < math.log(low)) | (log_ratio > math.log(high)))
