"""`Precision`: the arithmetic of a run, read by both the actor and the rollout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_r3.config import Config


@dataclass(frozen=True)
class Precision:
    """What one name of `actor.precision` stands for.

    Attributes:
        name: the setting.
        dtype: of the actor's parameters and activations; main weights, gradients and moments stay fp32.
        vllm_dtype: vLLM's name for the rollout's dtype.
    """

    name: str
    dtype: torch.dtype
    vllm_dtype: str

    @property
    def bf16(self) -> bool:
        """Whether megatron-core must keep fp32 main weights beside bf16 ones."""
        return self.dtype is torch.bfloat16


PRECISIONS = {
    "bf16": Precision("bf16", torch.bfloat16, "bfloat16"),
    "fp32": Precision("fp32", torch.float32, "float32"),
}


def precision_of(config: Config) -> Precision:
    """The precision a config asks for."""
    return PRECISIONS[config.actor.precision]
