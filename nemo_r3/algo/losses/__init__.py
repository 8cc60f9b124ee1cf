"""Policy losses, one file each, found by the name in `algo.loss`.

A file gives the loss of a token, and its name is a choice of `algo.loss`. The whole loss is the sum over tokens of
weight * policy_loss, with the weights that its AGGREGATION gives and the advantages that its ADVANTAGE gives.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from nemo_r3.algo.advantages import Advantage
from nemo_r3.algo.aggregation import Aggregation


class Loss(Protocol):
    """What a file of this folder declares."""

    AGGREGATION: Aggregation  # how tokens share the loss
    ADVANTAGE: Advantage  # what rewards are measured against, unless `algo.advantage` says
    CLIP: tuple[float, float] | None  # the paper's (low, high): ratios stay in [1 - low, 1 + high]; None: no clipping

    def policy_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        sequences: Tensor,
        clip: tuple[float, float] | None,
    ) -> Tensor:
        """The loss of each token.

        Args:
            logprobs: [tokens] of the policy, with gradient.
            old_logprobs: [tokens] of the policy before this step's first update, without gradient.
            advantages: [tokens] of each token's sequence.
            sequences: [tokens] int64, the sequence of each token: never decreasing, each sequence whole.
            clip: low and high; None if CLIP is.

        Returns:
            [tokens] of the type of `logprobs`.
        """


def loss_named(name: str) -> Loss:
    """The loss of `algo.loss`."""
    return cast(Loss, import_module(f"{__name__}.{name}"))
