"""CISPO (MiniMax-M1, arXiv 2506.13585, equations 4 and 5): clips the importance weight, never the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_r3.algo.advantages import Advantage
from nemo_r3.algo.aggregation import Aggregation

AGGREGATION = Aggregation.TOKEN_MEAN
ADVANTAGE = Advantage.STD
CLIP = (1.0, 4.0)  # weights in [0, 5]: the paper has no lower bound, and TRL's upper one is 5


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequences: Tensor, clip: tuple[float, float]
) -> Tensor:
    """-stop_gradient(clip(ratio)) * A * logprob at each token."""
    weight = torch.exp(logprobs.detach() - old_logprobs).clamp(1 - clip[0], 1 + clip[1])
    return -weight * advantages * logprobs
