"""GRPO's clipped policy loss per token (arXiv 2402.03300, equation 3, without its KL term)."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_r3.config import AlgoConfig


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, config: AlgoConfig) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) at each token.

    Args:
        logprobs: [tokens] of the policy, float32, with gradient.
        old_logprobs: [tokens] of the policy before this step's first update.
        advantages: [tokens] of each token's reflection.
        config: the clip range.

    Returns:
        [tokens] float32.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)
