"""`Pipeline`: runs microbatches through the stages, from token ids to log-probabilities, and back.

Microbatch -> Trunk (1F1B over the stages) -> hidden states at the targets' sources
           -> vocab-parallel head -> log-probabilities and entropies -> loss
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor, nn

from nemo_r3 import watchdog
from nemo_r3.actor.attention import packed
from nemo_r3.actor.head import Columns, target_logprobs
from nemo_r3.actor.model import Trunk
from nemo_r3.actor.rotary import Rotary
from nemo_r3.algo.packing import Microbatch

LossFunction = Callable[[Microbatch, Tensor, Tensor], tuple[Tensor, Any]]
"""(microbatch, log-probabilities [trained], entropies [trained]) -> (scalar loss, what `run` is to return)."""


@dataclass(frozen=True)
class Pipeline:
    """Runs microbatches through this rank's stage, together with the other stages."""

    trunk: Trunk  # this stage
    vocab_size: int  # of the model, without padding
    rotary: Rotary  # at the rollout's lengths
    temperature: float  # the rollout's

    def run(self, model: nn.Module, microbatches: Sequence[Microbatch], loss: LossFunction, train: bool) -> list[Any]:
        """Runs every microbatch; `loss` is called on the last stage.

        Args:
            model: the trunk, wrapped in its gradient buffers if it trains.
            microbatches: the same number on every rank.
            loss: of one microbatch.
            train: whether to run backward too.

        Returns:
            The second value that `loss` returned for each microbatch; empty except on the last stage.
        """

        def forward_step(stream: Iterator[Microbatch], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            microbatch = next(stream)
            watchdog.alive()
            dtype = self.trunk.config.params_dtype
            params = packed(microbatch.layout, self.rotary, dtype, microbatch.routed_experts)
            ids, positions = microbatch.ids[None], microbatch.layout.positions[None]
            hidden = model(ids, positions, None, packed_seq_params=params)

            def on_last_stage(hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
                scalar, result = loss(microbatch, *self._head(microbatch, hidden))
                # the token count that megatron-core would divide gradients by: ours are already normalised
                return scalar, torch.zeros((), dtype=torch.int64, device=scalar.device), result

            return hidden, on_last_stage

        with torch.set_grad_enabled(train):
            results: list[Any] = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(microbatches),
                model=[model],
                num_microbatches=len(microbatches),
                seq_length=max(len(microbatch.ids) for microbatch in microbatches),
                micro_batch_size=1,
                forward_only=not train,
            )
        return results

    def _head(self, microbatch: Microbatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the targets from hidden states [tokens (/ tensor_parallel), 1, hidden]."""
        hidden = hidden[:, 0]
        size = parallel_state.get_tensor_model_parallel_world_size()
        if self.trunk.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        elif size > 1:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        weight, targets = self.trunk.head_weight(), microbatch.targets
        start = parallel_state.get_tensor_model_parallel_rank() * len(weight)
        group = parallel_state.get_tensor_model_parallel_group() if size > 1 else None
        columns = Columns(start, min(len(weight), self.vocab_size - start), group)
        return target_logprobs(hidden[targets.sources], weight, targets.ids, self.temperature, columns)
