"""GRPO (arXiv 2402.03300, equation 3, without its KL term): PPO's clipped loss, no critic."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_r3.algo.advantages import Advantage
from nemo_r3.algo.aggregation import Aggregation

AGGREGATION = Aggregation.SEQUENCE_MEAN
ADVANTAGE = Advantage.STD
CLIP = (0.2, 0.2)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequences: Tensor, clip: tuple[float, float]
) -> Tensor:
    """-min(ratio * A, clip(ratio) * A) at each token."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    return -torch.minimum(ratio * advantages, clipped * advantages)
