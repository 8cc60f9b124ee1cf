"""One pass of microbatches through the pipeline: log-probabilities of the targets, and the loss on them.

Microbatch -> GPTModel (1F1B over the stages) -> logits, of which the trained positions' / temperature
           -> vocab-parallel log-softmax -> loss with global denominators
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor, nn

from nemo_r3.algo.kl import kl
from nemo_r3.algo.mismatch import importance_weights, prob_error
from nemo_r3.algo.packing import Microbatch
from nemo_r3.config import AlgoConfig

METRICS = ("loss", "kl", "prob_error", "tokens")
LossFunction = Callable[[Microbatch, Tensor], tuple[Tensor, Any]]


def run_microbatches(
    model: nn.Module, microbatches: Sequence[Microbatch], loss: LossFunction, train: bool
) -> list[Any]:
    """Runs every microbatch through this rank's stage; `loss` sees the logits on the last stage.

    Args:
        model: this stage.
        microbatches: the same number on every rank.
        loss: (microbatch, logits [tokens, vocabulary / tensor_parallel]) -> (scalar loss, anything to return).
        train: whether to run backward too.

    Returns:
        What `loss` returned beside its scalar, one per microbatch; empty on the other stages.
    """
    tokens = max(len(microbatch.ids) for microbatch in microbatches)
    with torch.set_grad_enabled(train):
        return get_forward_backward_func()(
            forward_step_func=partial(_forward_step, loss),
            data_iterator=iter(microbatches),
            model=[model],
            num_microbatches=len(microbatches),
            seq_length=tokens,
            micro_batch_size=1,
            forward_only=not train,
        )


def _forward_step(
    loss: LossFunction, microbatches: Iterator[Microbatch], model: nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Any]]]:
    microbatch = next(microbatches)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=microbatch.bounds,
        cu_seqlens_kv=microbatch.bounds,
        max_seqlen_q=microbatch.longest,
        max_seqlen_kv=microbatch.longest,
    )
    output = model(microbatch.ids[None], microbatch.positions[None], None, packed_seq_params=packed)

    def on_last_stage(logits: Tensor) -> tuple[Tensor, Tensor, Any]:
        scalar, result = loss(microbatch, logits[0])
        # megatron-core would divide gradients by the token count that stands here; ours are already normalised
        return scalar, torch.zeros((), dtype=torch.int64, device=scalar.device), result

    return output, on_last_stage


def target_logprobs(logits: Tensor, targets: Tensor, temperature: float, vocab_size: int, vocab_start: int) -> Tensor:
    """Log-probabilities of the targets under softmax(logits / temperature).

    Args:
        logits: [tokens, vocabulary / tensor_parallel], this rank's columns.
        targets: [tokens] int64.
        temperature: the rollout's.
        vocab_size: real columns; what lies beyond is padding and gets probability 0.
        vocab_start: this rank's first column.

    Returns:
        [tokens] float32, the same on every tensor-parallel rank.
    """
    scaled = logits.float() / temperature
    real = vocab_size - vocab_start
    if real < scaled.shape[-1]:
        padding = torch.arange(scaled.shape[-1], device=scaled.device) >= real
        scaled = scaled.masked_fill(padding, float("-inf"))
    return -vocab_parallel_cross_entropy(scaled[:, None], targets[:, None])[:, 0]


def policy_loss(
    algo: AlgoConfig, logprobs_of: Callable[[Tensor, Tensor], Tensor], reference: dict[tuple[int, ...], Tensor]
) -> LossFunction:
    """The training loss: clipped policy loss plus KL, on trained tokens only, weighted by their share.

    Args:
        algo: which loss, KL and correction.
        logprobs_of: (logits, targets) -> [tokens] log-probabilities.
        reference: log-probabilities of the frozen reference at the trained tokens, by the microbatch's rows.
    """
    per_token = import_module(f"nemo_r3.algo.losses.{algo.loss}").policy_loss

    def loss(microbatch: Microbatch, logits: Tensor) -> tuple[Tensor, Tensor]:
        trained = microbatch.weights.nonzero()[:, 0]
        logprobs = logprobs_of(logits[trained], microbatch.targets[trained])
        rollout, weights = microbatch.rollout_logprobs[trained], microbatch.weights[trained]
        # one update per rollout: the old policy is the current one
        tokens = per_token(logprobs, logprobs.detach(), microbatch.advantages[trained], algo)
        tokens = tokens * importance_weights(logprobs, rollout, algo)
        drift = torch.zeros_like(tokens)
        if algo.kl_beta:
            drift = kl(logprobs, reference[microbatch.rows], algo.kl_estimator)
        total = (weights * (tokens + algo.kl_beta * drift)).sum()
        sums = (total, (weights * drift).sum(), prob_error(logprobs, rollout).sum(), torch.tensor(len(trained)))
        return total, torch.stack([value.detach().double().to(total.device) for value in sums])

    return loss
