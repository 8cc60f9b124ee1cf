"""What a training pass over a model costs, counted from its shape (arXiv 2104.04473, section 5.1)."""

from __future__ import annotations

from nemo_r3.algo.balance import Cost
from nemo_r3.models.architecture import Architecture

FORWARD_AND_BACKWARD = 3
"""Times the forward pass: backward multiplies by every matrix twice."""


def training_cost(arch: Architecture) -> Cost:
    """FLOPs of forward and backward; a multiplication with its addition counts as 2."""
    queries, keys = arch.num_heads * arch.head_dim, 2 * arch.num_kv_heads * arch.head_dim
    layer = arch.hidden_size * (2 * queries + keys + 3 * arch.ffn_hidden_size)
    return Cost(
        per_token=FORWARD_AND_BACKWARD * 2 * arch.num_layers * layer,
        per_pair=FORWARD_AND_BACKWARD * 4 * arch.num_layers * queries,
        per_target=FORWARD_AND_BACKWARD * 2 * arch.hidden_size * arch.vocab_size,
    )
