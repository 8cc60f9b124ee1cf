"""`Policy`: the megatron-core model being trained, on all ranks at once (SPMD)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from nemo_r3 import memory
from nemo_r3.actor import cpu, stream
from nemo_r3.actor.forward import Pipeline
from nemo_r3.actor.model import build_model, start_parallel_groups
from nemo_r3.actor.offload import Offload, device_bytes, forget_fp8_weights
from nemo_r3.actor.optimizer import build_optimizer, build_schedule, wrap
from nemo_r3.actor.reference import Reference
from nemo_r3.actor.rotary import Rotary
from nemo_r3.actor.scales import find_scales
from nemo_r3.actor.weights import export_hf, load_hf
from nemo_r3.algo.balance import Balance
from nemo_r3.algo.batch import check_loss_weights
from nemo_r3.algo.objective import METRICS, Objective
from nemo_r3.algo.packing import Microbatch, pack
from nemo_r3.config import Config
from nemo_r3.models import Architecture, architecture_of, fingerprint, model_path
from nemo_r3.models.flops import FORWARD_AND_BACKWARD, training_cost
from nemo_r3.precision import precision_of, without_fp8
from nemo_r3.runtime import World
from nemo_r3.types import Row, UpdateBatch


class Policy:
    """This rank's shard of the policy with its optimizer, schedule and frozen reference.

    Every method is collective: all ranks call it together with the same arguments.

    Attributes:
        arch: the model's shape.
        fingerprint: of the starting checkpoint.
        version: how many optimizer steps the weights have seen; stamped on every sampled token.
    """

    def __init__(self, config: Config, world: World, trains: bool = True, with_weights: bool = True) -> None:
        """Builds the model and reads the starting checkpoint.

        Args:
            config: the run's settings.
            world: all ranks.
            trains: False leaves out gradients, optimizer, reference and FP8, for scoring and exporting.
            with_weights: False leaves the weights to `checkpoint.load`, which must come first; a policy that trains
                needs them for its reference.

        Raises:
            ConfigError: the checkpoint does not exist or does not fit its config.json.
        """
        assert with_weights or not trains, "a policy that trains reads the starting weights"
        cpu.prepare()
        config = config if trains else without_fp8(config)
        self.config, self.world = config, world
        self.arch: Architecture = architecture_of(model_path(config))
        self.fingerprint = fingerprint(model_path(config), self.arch)
        self.version = 0
        self._stream = torch.cuda.current_stream()  # where the gradients' hooks will run
        self._working_bytes = 0
        recipe = precision_of(config).fp8
        self._lacks_scales = recipe is not None and recipe.delayed
        self.optimizer: MegatronOptimizer | None = None
        with cpu.cuda_stand_in():
            start_parallel_groups(config)
            self.module = build_model(config, self.arch, world)
            if with_weights:
                load_hf(self.module, self.arch, model_path(config))
            self.model: Any = self.module
            if trains:
                self.model = wrap(self.module, config)
                self.model.config.finalize_model_grads_func = _sum_gradients
                self.optimizer = build_optimizer(self.model, config, precision_of(config))
                self.schedule = build_schedule(self.optimizer, config)
        rotary = Rotary.of(self.arch.rope, config.rollout.max_model_len, world.device)
        self._pipeline = Pipeline(self.module, self.arch, rotary, config.rollout.temperature)
        self._objective = Objective(config.algo)
        has_reference = trains and config.algo.kl_beta
        self._reference = Reference(self.module, config.actor.offload_optimizer) if has_reference else None
        self._offload = Offload(self.model, self.optimizer) if trains and config.actor.offload_optimizer else None
        self._make_room()  # for the engine, which starts next

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Holds optimizer state and gradients on the device inside this block; then hands the memory to the engine."""
        if self._offload is not None:
            self._offload.restore()
        try:
            yield
        finally:
            self._make_room()

    def _make_room(self) -> None:
        """Hands memory to the engine: FP8 copies of the weights, and if offloaded, optimizer state and gradients."""
        if self._offload is not None:
            self._offload.park()
        forget_fp8_weights(self.module)
        torch.cuda.empty_cache()

    def update(self, batch: UpdateBatch) -> dict[str, float]:
        """One optimizer step on the batch.

        Returns:
            `loss`, `kl`, `entropy`, `grad_norm`, `lr`, `trained_tokens`, `rejected_tokens`, `microbatches`;
            `skipped`: 1.0 if the weights stayed as they were, because the gradient was NaN or Inf or the correction
            rejected every token; the mismatch with the rollout: `token_mult_prob_error`, `rollout_kl`,
            `importance_ratio`, `importance_outliers` (a share) and `nonfinite_tokens`; `update_flops`: the model's
            on all ranks, including the reference's pass, without recompute and padding.

        Raises:
            RuntimeError: a token that must not be trained has weight.
        """
        check_loss_weights(batch, self.config.algo)
        microbatches, flops = self._microbatches(batch.rows)
        with stream.on(self._stream), self.at_work(), cpu.cuda_stand_in():
            memory.reserve(self._working_bytes)
            before = memory.restart_peak()
            if self._lacks_scales:
                find_scales(self.module, self.world, partial(self._accumulate, microbatches[:1]))
                self._lacks_scales = False
            sums = self._accumulate(microbatches)
            self._working_bytes = memory.peak() - before  # the optimizer's step needs less
            lr = self.optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
            grad_norm = self._step(finite=math.isfinite(sums["loss"]) and sums["kept"] > 0)
        tokens = max(sums["tokens"], 1.0)
        return {
            "loss": sums["loss"],
            "kl": sums["kl"],
            "entropy": sums["entropy"] / tokens,
            "token_mult_prob_error": sums["prob_error"] / tokens,
            "rollout_kl": sums["rollout_kl"] / tokens,
            "importance_ratio": sums["ratio"] / tokens,
            "importance_outliers": sums["outliers"] / tokens,
            "nonfinite_tokens": sums["nonfinite"],
            "grad_norm": grad_norm,
            "lr": lr,
            "trained_tokens": sums["tokens"],
            "rejected_tokens": sums["rejected"],
            "microbatches": float(len(microbatches)),
            "skipped": float(not math.isfinite(grad_norm)),
            "update_flops": flops * (1 if self._reference is None else 1 + 1 / FORWARD_AND_BACKWARD),
        }

    def _accumulate(self, microbatches: Sequence[Microbatch]) -> dict[str, float]:
        """Accumulates the step's gradient in the buffers; returns the step's `METRICS`."""
        assert self.optimizer is not None, "a policy that does not train"
        reference: dict[tuple[int, ...], Tensor] = {}
        if self._reference is not None:
            with self._reference.swapped_in():
                reference = self._score(microbatches)
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

        def loss(microbatch: Microbatch, logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
            return self._objective(logprobs, microbatch.targets, reference.get(microbatch.rows), entropies)

        sums = self._sum(self._pipeline.run(self.model, microbatches, loss, train=True))
        if 0 < sums["kept"] < sums["counted"]:  # rejected tokens leave the denominators of the whole step
            scale = sums["counted"] / sums["kept"]
            self.model.scale_gradients(scale)
            sums |= {name: sums[name] * scale for name in ("loss", "kl")}
        return sums

    def _step(self, finite: bool) -> float:
        """Clips, steps and advances the schedule; returns the gradient norm, or NaN if the step is skipped."""
        assert self.optimizer is not None
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not (finite and math.isfinite(grad_norm)):
            return math.nan
        self.optimizer.step()
        self.schedule.step(increment=1)
        self.version += 1
        return grad_norm

    def held(self) -> dict[str, int]:
        """Bytes that this rank holds, by what they are for; what is offloaded counts as the host's."""
        away = " on the host" if self._offload is not None else ""
        weights = sum(parameter.nbytes for parameter in self.module.parameters())
        assert self.optimizer is not None, "a policy that does not train"
        gradients, state = device_bytes(self.model, self.optimizer)
        return {
            "weights": weights,
            "gradients": gradients,
            "optimizer state": state,
            "optimizer state on the host": 0 if self._offload is None else self._offload.host_bytes,
            "activations and other work, peak": self._working_bytes,
            "reference" + away: 0 if self._reference is None else self._reference.nbytes,
        }

    def describe_schedule(self) -> str:
        """When the learning rate reaches its end; a resumed run keeps the horizon it began with."""
        return f"the learning rate reaches {self.config.actor.lr_min:g} after {self.schedule.lr_decay_steps} updates"

    def updates_left(self) -> float:
        """How many more updates have a learning rate above 0; skipped updates do not count."""
        if self.config.actor.lr_min:
            return math.inf
        return max(int(self.schedule.lr_decay_steps - self.schedule.num_steps), 0)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probabilities of every token but the first, at the rollout temperature.

        Args:
            sequences: token ids.

        Returns:
            One [length - 1] float32 tensor per sequence, on the CPU, on every rank.
        """
        rows = [_scored_row(ids) for ids in sequences]
        microbatches, _ = self._microbatches(rows)
        own: dict[int, Tensor] = {}
        with cpu.cuda_stand_in():
            scores = self._score(microbatches)
        for numbers, logprobs in scores.items():
            lengths = [len(rows[number]) - 1 for number in numbers]
            own.update(zip(numbers, logprobs.cpu().split(lengths), strict=True))
        merged: dict[int, Tensor] = {}
        for part in self.world.gather(own):
            merged.update(part)
        return [merged[number] for number in range(len(rows))]

    def export_hf(self) -> Iterator[tuple[str, Tensor]]:
        """Streams the weights under their Hugging Face names; every rank iterates to the end, in lockstep."""
        return cpu.on_any_device_stream(export_hf(self.module, self.arch))

    # microbatches and log-probabilities

    def _microbatches(self, rows: Sequence[Row]) -> tuple[list[Microbatch], float]:
        """This rank's microbatches, and the FLOPs of training on all rows: shared contexts once, without padding."""
        actor = self.config.actor
        if not actor.shared_context:
            rows = [replace(row, shared=0) for row in rows]
        balance = Balance(rows, training_cost(self.arch), actor.microbatch_tokens)
        dealt = balance.deal(parallel_state.get_data_parallel_world_size(), stages=actor.pipeline_parallel)
        multiple = precision_of(self.config).row_multiple(actor)
        mine = dealt[parallel_state.get_data_parallel_rank()]
        flops = sum(balance.flops(piece) for rank in dealt for pieces in rank for piece in pieces)
        return [pack(rows, pieces, multiple).to(self.world.device) for pieces in mine], flops

    def _score(self, microbatches: Sequence[Microbatch]) -> dict[tuple[int, ...], Tensor]:
        """Log-probabilities [trained] of the targets, by each microbatch's rows; empty except on the last stage."""

        def keep_logprobs(_: Microbatch, logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
            return logprobs.sum(), logprobs

        self.model.eval()
        scores = self._pipeline.run(self.model, microbatches, keep_logprobs, train=False)
        self.model.train()
        return {microbatch.rows: logprobs for microbatch, logprobs in zip(microbatches, scores, strict=False)}

    def _sum(self, metrics: Sequence[Tensor]) -> dict[str, float]:
        """Sums the last stages' metrics over microbatches and data-parallel ranks."""
        total = torch.zeros(len(METRICS), dtype=torch.float64, device=self.world.device)
        if metrics and parallel_state.get_tensor_model_parallel_rank() == 0:  # all of a tensor-parallel group are alike
            total += torch.stack(list(metrics)).sum(0)
        dist.all_reduce(total)
        return dict(zip(METRICS, total.tolist(), strict=True))


def _scored_row(ids: Sequence[int]) -> Row:
    """A row whose tokens are all targets."""
    count = len(ids)
    zeros = [0.0] * count
    return Row(ids, (), (), zeros, [1.0] * count, zeros)


def _sum_gradients(model: list[Any], num_tokens: Tensor | None = None, **groups: Any) -> None:
    """megatron-core's gradient reduction, without its division by a token count."""
    finalize_model_grads(model, None, **groups)
