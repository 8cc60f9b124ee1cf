"""`Objective`: the whole loss of a microbatch.

log-probabilities -> mismatch correction: factors, rejected tokens -> policy loss and KL of the kept tokens -> scalar
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_r3.algo.aggregation import denominators, kept_weights
from nemo_r3.algo.kl import kl
from nemo_r3.algo.losses import loss_named
from nemo_r3.algo.mismatch import BOUNDS, correct, outside, prob_error, ratios, rollout_kl
from nemo_r3.algo.packing import Targets
from nemo_r3.config import AlgoConfig

PER_TOKEN = ("entropy", "token_mult_prob_error", "rollout_kl", "importance_ratio", "importance_outliers", "clipped")
"""Of `METRICS`, those that are means once they are divided by the trained tokens, which include rejected ones."""
COUNTS = ("nonfinite_tokens", "trained_tokens", "rejected_tokens")
METRICS = ("loss", "kl", "counted", "kept", *PER_TOKEN, *COUNTS)
"""What an `Objective` returns as sums, which add up over microbatches and data-parallel ranks; see docs/metrics.md.

- loss: the scalar, including the KL; kl: the KL alone, weighted like the loss but without `algo.kl_beta`. At the end of
  an update both, and the gradient, are multiplied by counted / kept.
- counted, kept: the loss's denominator with and without rejected tokens (tokens or sequences, as the loss aggregates).
  If kept is 0, so are loss, kl and gradient.
"""


class Objective:
    """The loss that `algo` describes, made once per run.

    The old policy is the one before the step's first update. In that update it is the current one: all ratios are 1,
    and no loss clips anything.
    """

    def __init__(self, algo: AlgoConfig) -> None:
        self.algo = algo
        self.loss = loss_named(algo.loss)
        low, high = BOUNDS[algo.mismatch_correction]
        self.ratio_bounds = (
            low if algo.mismatch_low is None else algo.mismatch_low,
            high if algo.mismatch_high is None else algo.mismatch_high,
        )

    def __call__(
        self,
        logprobs: Tensor,
        targets: Targets,
        reference: Tensor | None,
        entropy: Tensor,
        old: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and sums of a microbatch, which may be empty or have all its tokens rejected.

        If nothing can be rejected, the host does not wait for the device before the backward pass.

        Args:
            logprobs: [trained] float32 of the policy, with gradient.
            targets: its trained tokens.
            reference: [trained] of the frozen reference; None if `algo.kl_beta` is 0.
            entropy: [trained] of the policy's distributions, without gradient.
            old: [trained] of the old policy; None if that is the current one.

        Returns:
            The scalar to differentiate, and the sums of METRICS, [metrics] float64, without gradient.
        """
        algo, aggregation = self.algo, self.loss.AGGREGATION
        before = logprobs.detach() if old is None else old
        sequences, log_ratio = targets.sequences, before - targets.rollout_logprobs
        factors, kept = correct(log_ratio, sequences, algo.mismatch_correction, *self.ratio_bounds)
        weights = kept_weights(targets.weights, kept, sequences, aggregation)
        new = logprobs[kept]
        advantages = targets.advantages[kept]
        policy = self.loss.policy_loss(new, before[kept], advantages, sequences[kept], self.loss.CLIP)
        divergence = torch.zeros_like(new) if reference is None else kl(new, reference[kept], algo.kl_estimator)
        loss = (weights * (factors[kept] * policy + algo.kl_beta * divergence)).sum()
        counted, left = denominators(kept, sequences, aggregation)
        sums = {
            "loss": loss,
            "kl": (weights * divergence).sum(),
            "counted": counted,
            "kept": left,
            "entropy": entropy.sum(),
            "token_mult_prob_error": prob_error(log_ratio).sum(),
            "rollout_kl": rollout_kl(log_ratio).sum(),
            "importance_ratio": ratios(log_ratio).sum(),
            "importance_outliers": outside(log_ratio).sum(),
            "clipped": loss.new_zeros(()) if old is None else _clipped(policy, new, advantages),
            "nonfinite_tokens": (~logprobs.isfinite()).sum(),
            "trained_tokens": loss.new_full((), len(targets)),
            "rejected_tokens": loss.new_full((), len(targets) - len(new)),
        }
        return loss, torch.stack([sums[name].detach().double() for name in METRICS])


def _clipped(policy: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
    """How many tokens have an advantage, but no gradient from the policy loss."""
    (slopes,) = torch.autograd.grad(policy.sum(), logprobs, retain_graph=True)
    return ((slopes == 0) & (advantages != 0)).sum()
