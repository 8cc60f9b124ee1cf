"""RLOO (arXiv 2402.14740): REINFORCE on whole sequences, each against the mean reward of the others.

The paper takes the KL off the reward; here it is a term of the loss, as for every other loss.
"""

from __future__ import annotations

from torch import Tensor

from nemo_r3.algo.advantages import Advantage
from nemo_r3.algo.aggregation import Aggregation

AGGREGATION = Aggregation.SEQUENCE_SUM
ADVANTAGE = Advantage.LEAVE_ONE_OUT
CLIP = None


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequences: Tensor, clip: None) -> Tensor:
    """-A * logprob at each token."""
    return -advantages * logprobs
