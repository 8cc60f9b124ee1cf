"""`Targets`: the tokens of a microbatch that carry loss, and all that a loss needs to know about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The trained tokens of a microbatch, sequence after sequence."""

    sources: Tensor
    """[trained] int64, place in the microbatch of the hidden state that predicts the token; the same for the first
    tokens of all reflections of a group."""
    ids: Tensor  # [trained] int64, the tokens
    sequences: Tensor
    """[trained] int64, which sequence of the microbatch each belongs to: from 0, never decreasing. A sequence is never
    split over microbatches."""
    advantages: Tensor  # [trained] float32
    weights: Tensor  # [trained] float32, the token's share in its update's loss, never 0
    rollout_logprobs: Tensor  # [trained] float32, vLLM's log-probabilities (nats)

    def to(self, device: torch.device) -> Targets:
        """The same on another device."""
        return Targets(**{name: value.to(device) for name, value in vars(self).items()})

    def __len__(self) -> int:
        return len(self.ids)
