"""GSPO (arXiv 2507.18071, equations 5 to 7): one ratio per sequence, the geometric mean of its tokens' ratios."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_r3.algo.advantages import Advantage
from nemo_r3.algo.aggregation import Aggregation, sequence_means
from nemo_r3.algo.losses import grpo

AGGREGATION = Aggregation.SEQUENCE_MEAN
ADVANTAGE = Advantage.STD
CLIP = (3e-4, 4e-4)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequences: Tensor, clip: tuple[float, float]
) -> Tensor:
    """-min(s * A, clip(s) * A) at each token, s the ratio of its sequence."""
    log_ratio = sequence_means(logprobs - old_logprobs, sequences)
    return grpo.policy_loss(log_ratio, torch.zeros_like(log_ratio), advantages, sequences, clip)
