"""Rotary angles from a `Rope`, by the same float32 operations in the same order as in transformers and vLLM."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_r3.models.rope import Llama3, LongRope, Rope


@dataclass(frozen=True)
class Rotary:
    """How fast each pair of channels rotates."""

    frequencies: Tensor  # [dim / 2] float32, radians per position
    magnitude: float = 1.0  # what cosines and sines are multiplied by

    @classmethod
    def of(cls, rope: Rope, max_model_len: int, device: torch.device) -> Rotary:
        """For sequences of up to `max_model_len` tokens; only longrope depends on the length."""
        wavelengths = rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
        match rope.scaling:
            case None:
                return cls((1 / wavelengths).to(device))
            case Llama3() as scaling:
                return cls(_llama3(1 / wavelengths, scaling).to(device))
            case LongRope() as scaling:
                factors = scaling.long if rope.regime(max_model_len) == "long" else scaling.short
                return cls((1 / (torch.tensor(factors) * wavelengths)).to(device), scaling.magnitude)

    def waves(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [tokens, 1, dim / 2] at positions [tokens]."""
        angles = positions.float()[:, None] * self.frequencies
        cos, sin = (wave(angles) * self.magnitude for wave in (torch.cos, torch.sin))
        return cos.to(dtype)[:, None], sin.to(dtype)[:, None]


def _llama3(frequencies: Tensor, scaling: Llama3) -> Tensor:
    """Full speed above `high_freq_factor` turns within the original context, 1 / factor below `low_freq_factor`."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_positions / (2 * math.pi / frequencies)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * frequencies / scaling.factor + share * frequencies
