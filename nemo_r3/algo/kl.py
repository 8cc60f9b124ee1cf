"""Per-token estimators of KL(policy || reference) (http://joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

import torch
from torch import Tensor


def kl(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Estimates the KL at each sampled token.

    Args:
        logprobs: [tokens] of the policy, float32, with gradient.
        reference: [tokens] of the frozen reference.
        estimator: "k1" (unbiased, any sign), "k2" (squared) or "k3" (unbiased, never negative; GRPO's).

    Returns:
        [tokens] float32.
    """
    log_ratio = reference - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"algo.kl_estimator={estimator!r}")
