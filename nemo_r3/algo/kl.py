"""Per-token estimators of KL(policy || reference) (http://joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

import torch
from torch import Tensor


def kl(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Estimates the KL at each sampled token.

    Args:
        logprobs: [tokens] of the policy, float32, with gradient.
        reference: [tokens] of the frozen reference.
        estimator: "k2" or "k3" (GRPO's). Over the policy's samples, the mean of k3 is KL(policy || reference), that of
            k2 only nearly. As a term of a loss it is the other way round: k2's mean gradient is that of
            KL(policy || reference), k3's that of KL(reference || policy). k1 is not offered: its mean gradient is 0.

    Returns:
        [tokens] float32.
    """
    log_ratio = reference - logprobs
    if estimator == "k2":
        return log_ratio.square() / 2
    return torch.expm1(log_ratio) - log_ratio
