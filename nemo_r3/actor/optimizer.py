"""AdamW on all weights, its learning-rate schedule and the gradient buffers, from megatron-core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor
from torch.optim import AdamW

from nemo_r3.actor.offload import Offload, device_bytes
from nemo_r3.actor.optimizer_state import set_step, sharded_state
from nemo_r3.config import Config
from nemo_r3.precision import precision_of


class FullOptimizer:
    """Trains all weights of a stage: megatron-core's gradient buffers and its distributed optimizer.

    Attributes:
        model: the stage in its gradient buffers, which the pipeline has to run.
        parts: megatron-core's optimizer.
    """

    def __init__(self, module: GPTModel, config: Config) -> None:
        self.model = wrap(module, config)
        module.config.finalize_model_grads_func = _sum_gradients
        self.parts = build_optimizer(self.model, config)
        self._clip = config.actor.clip_grad
        self._offload = Offload(self.model, self.parts) if config.actor.offload_optimizer else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """AdamW's, whose learning rate a schedule sets."""
        groups: list[dict[str, Any]] = self.parts.param_groups
        return groups

    def zero_gradients(self) -> None:
        """Before the first microbatch of an update."""
        self.model.zero_grad_buffer()
        self.parts.zero_grad()

    def scale_gradients(self, factor: float) -> None:
        """Multiplies what an update has summed."""
        self.model.scale_gradients(factor)

    def gradient_norm(self) -> float:
        """Over all ranks; `step` comes next, or nothing."""
        self.parts.prepare_grads()
        return float(self.parts.get_grad_norm())

    def step(self, norm: float) -> None:
        """Clips gradients of this `gradient_norm`, and changes the weights.

        megatron-core's own `step` would do as much, but where the norm is NaN or Inf, too.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if parameters and self._clip:
            clip_grad_by_total_norm_fp32(parameters, self._clip, norm)
        self.parts.step_with_ready_grads()

    def park(self) -> None:
        """With `actor.offload_optimizer`, moves the state to the host and frees the gradient buffers."""
        if self._offload is not None:
            self._offload.park()

    def restore(self) -> None:
        """Undoes `park`."""
        if self._offload is not None:
            self._offload.restore()

    def held(self) -> dict[str, int]:
        """Bytes that this rank holds, by what they are for."""
        gradients, state = device_bytes(self.model, self.parts)
        return {
            "gradients": gradients,
            "optimizer state": state,
            "optimizer state on the host": 0 if self._offload is None else self._offload.host_bytes,
        }

    def sharded_state(self, weights: Mapping[str, Any]) -> list[ShardedTensor]:
        """This rank's parts of a checkpoint's optimizer state; `weights` is the model's sharded state."""
        return sharded_state(self.parts, weights)

    def loaded(self, step: int) -> None:
        """After a checkpoint was read into weights and state, which has seen so many steps."""
        set_step(self.parts, step)


def _sum_gradients(model: list[Any], num_tokens: Tensor | None = None, **groups: Any) -> None:
    """megatron-core's gradient reduction, without its division by a token count."""
    finalize_model_grads(model, None, **groups)


def wrap(model: GPTModel, config: Config) -> DistributedDataParallel:
    """Gradient buffers over the data-parallel ranks, reduced in fp32.

    Each bucket is reduced as soon as the last microbatch's backward pass has filled it. Parameters are gathered right
    after the step, because the next refit reads them all.
    """
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=parallel_state.get_data_parallel_world_size() > 1,
    )
    wrapped = DistributedDataParallel(model.config, settings, model)
    model.config.no_sync_func = wrapped.no_sync
    return wrapped


def build_optimizer(model: DistributedDataParallel, config: Config) -> MegatronOptimizer:
    """AdamW with fp32 main weights."""
    actor = config.actor
    settings = OptimizerConfig(
        optimizer="adam",
        lr=actor.lr,
        min_lr=actor.lr_min,
        weight_decay=actor.weight_decay,
        adam_beta1=actor.adam_beta1,
        adam_beta2=actor.adam_beta2,
        adam_eps=actor.adam_eps,
        clip_grad=actor.clip_grad,
        **precision_of(config).optimizer_fields(),
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, AdamW):  # no Apex, no Transformer Engine
            start_adam_state(part.optimizer)
            for group in part.optimizer.param_groups:
                group["fused"] = True
        elif part.optimizer is not None:  # Transformer Engine's; None where this rank has no parameters
            part.init_state_fn(part.optimizer, part.config)
    return optimizer


def start_adam_state(adam: AdamW) -> None:
    """Allocates torch AdamW's moments: a checkpoint may precede the first step, and vLLM measures free memory."""
    for parameter in (p for group in adam.param_groups for p in group["params"]):
        adam.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def build_schedule(optimizer: Any, config: Config) -> OptimizerParamScheduler:
    """Linear warm-up from lr / warm-up steps (a first step at 0 would be wasted), then a cosine to `actor.lr_min`.

    A checkpoint's horizon wins over the config's: a run that is resumed with more `train.steps` keeps its curve.

    Args:
        optimizer: whatever has `param_groups`.
        config: the run's settings.
    """
    actor = config.actor
    horizon = actor.lr_decay_steps or max(config.train.steps, 1)
    warmup = min(round(horizon * actor.lr_warmup_ratio), horizon - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=actor.lr / max(warmup, 1),
        max_lr=actor.lr,
        min_lr=actor.lr_min,
        lr_warmup_steps=warmup,
        lr_decay_steps=horizon,
        lr_decay_style="cosine",
        start_wd=actor.weight_decay,
        end_wd=actor.weight_decay,
        wd_incr_steps=horizon,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=True,
    )


def schedule_state(schedule: OptimizerParamScheduler) -> dict[str, Any]:
    """What a checkpoint keeps of a schedule."""
    return schedule.state_dict() | {"init_lr": schedule.init_lr}  # which megatron-core forgets


def restore_schedule(schedule: OptimizerParamScheduler, state: Mapping[str, Any]) -> None:
    """The inverse of `schedule_state`; sets the learning rate, too."""
    schedule.init_lr = state["init_lr"]
    schedule.load_state_dict(dict(state))
