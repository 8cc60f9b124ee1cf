"""The gap between the engine that sampled and the actor that trains, measured and (if asked) corrected."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_r3.config import AlgoConfig


def prob_error(logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """exp|logp_actor - logp_vllm| at each token; its mean is `token_mult_prob_error` (NeMo-RL's name)."""
    return torch.exp((logprobs - rollout_logprobs).abs())


def importance_weights(logprobs: Tensor, rollout_logprobs: Tensor, config: AlgoConfig) -> Tensor:
    """Per-token weight of the policy loss: 1, or min(p_actor / p_vllm, cap) (truncated importance sampling).

    Returns:
        [tokens] float32, without gradient.
    """
    if config.mismatch_correction == "none":
        return torch.ones_like(logprobs)
    ratio = torch.exp(logprobs.detach() - rollout_logprobs)
    return ratio.clamp(max=config.mismatch_cap)
