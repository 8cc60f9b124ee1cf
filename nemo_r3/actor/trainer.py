"""`Trainer`: the policy's optimizer, on all ranks at once (SPMD). It turns a batch into new weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_r3 import memory
from nemo_r3.actor import cpu
from nemo_r3.actor.heap import FreedMemory
from nemo_r3.actor.lora import LoraOptimizer
from nemo_r3.actor.model import connect
from nemo_r3.actor.offload import forget_fp8_weights, forget_routing
from nemo_r3.actor.optimizer import FullOptimizer, build_schedule
from nemo_r3.actor.policy import Policy, Scores
from nemo_r3.actor.reference import Reference
from nemo_r3.actor.scales import find_scales
from nemo_r3.algo.batch import check_loss_weights
from nemo_r3.algo.objective import COUNTS, METRICS, PER_TOKEN, Objective
from nemo_r3.algo.packing import Microbatch
from nemo_r3.models.flops import step_flops
from nemo_r3.precision import precision_of
from nemo_r3.types import UpdateBatch


class Trainer:
    """This rank's part of the policy's gradients, optimizer, schedule and frozen reference.

    Every method is collective: all ranks call it together with the same arguments.

    Attributes:
        policy: whose weights it changes.
        optimizer: AdamW, and the gradients that it needs.
        schedule: of the learning rate.
    """

    def __init__(self, policy: Policy) -> None:
        """Wraps the policy, whose weights are still the starting ones: the reference is a copy of them."""
        config, recipe, lora = policy.config, precision_of(policy.config).fp8, policy.lora
        self.policy = policy
        self._stream = torch.cuda.current_stream()  # where the gradients' hooks will run
        connect(config, policy.arch, policy.world)
        with cpu.cuda_stand_in():
            if lora is None:
                self.optimizer: FullOptimizer | LoraOptimizer = FullOptimizer(policy.module, config)
                whole = policy.module.parameters()
                start = Reference(whole, config.actor.offload_optimizer) if config.algo.kl_beta else None
            else:
                start = Reference((site.weight for site in lora.sites), config.actor.offload_optimizer)
                self.optimizer = LoraOptimizer(lora, start, config)
            self.schedule = build_schedule(self.optimizer, config)
        self._objective = Objective(config.algo)
        self._start, self._reference = start, start if config.algo.kl_beta else None
        self._lacks_scales = recipe is not None and recipe.delayed
        self._working_bytes = 0
        self._freed = FreedMemory()
        self._make_room()  # for the engine, which starts next

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Holds optimizer state and gradients on the device inside this block; then hands the memory to the engine."""
        self.optimizer.restore()
        try:
            yield
        finally:
            self._make_room()

    def _make_room(self) -> None:
        """Hands memory to the engine: what passes leave behind, and if offloaded, optimizer state and gradients."""
        self.optimizer.park()
        forget_fp8_weights(self.policy.module)
        forget_routing(self.policy.module)
        torch.cuda.empty_cache()
        self._freed.limit()

    def update(self, batch: UpdateBatch) -> dict[str, float]:
        """One optimizer step on each of the batch's updates, all with the same learning rate.

        Returns:
            The metrics of docs/metrics.md that are the update's. Loss, KL and norm are means over the updates that were
            not skipped; if all were, over all.

        Raises:
            RuntimeError: a token that must not be trained has weight.
        """
        check_loss_weights(batch, self.policy.config.algo)
        updates, costs = zip(*map(self.policy.microbatches, batch.updates), strict=True)
        with on_stream(self._stream), self.at_work(), cpu.cuda_stand_in():
            memory.reserve(self._working_bytes)
            before = memory.restart_peak()
            if self._lacks_scales:
                one, layers = updates[0][:1], self.policy.module.decoder
                find_scales(layers, self.policy.world, lambda: self._accumulate(one, *self._given([one])[0]))
                self._lacks_scales = False
            lr = self.optimizer.param_groups[0]["lr"]
            if (replay := self.policy.replay) is not None:
                replay.start_counting()
            first, *others = zip(updates, self._given(updates), strict=True)
            found = [self._descend(*first)]
            mismatch = None if replay is None else replay.mismatch()  # of the weights that vLLM has, too
            found += [self._descend(*each) for each in others]
            self._working_bytes = memory.peak() - before
            taken = [each for each in found if not math.isnan(each["grad_norm"])]
            if taken:
                self.schedule.step(increment=1)
        metrics = self._combined(found, taken) | {
            "lr": lr,
            "microbatches": float(sum(map(len, updates))),
            "updates": float(len(found)),
            "skipped": float(len(found) - len(taken)),
            "update_flops": step_flops(costs, reference=self._reference is not None),
        }
        return metrics if mismatch is None else metrics | {"routing_mismatch": mismatch}

    def _combined(self, found: Sequence[Mapping[str, float]], taken: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """What `_descend` returned for a step's updates, in one; `taken` are those that were not skipped."""
        total = {name: sum(each[name] for each in found) for name in found[0]}
        metrics = {name: fmean(each[name] for each in taken or found) for name in ("loss", "kl", "grad_norm")}
        metrics |= {name: total[name] / max(total["trained_tokens"], 1.0) for name in PER_TOKEN}
        metrics |= {name: total[name] for name in COUNTS}
        if self._reference is None:
            del metrics["kl"]
        if self.policy.config.train.updates_per_step == 1:
            del metrics["clipped"]
        return metrics

    def _descend(self, microbatches: Sequence[Microbatch], given: tuple[Scores, Scores]) -> dict[str, float]:
        """One optimizer step; returns its `METRICS` and `grad_norm`, which is NaN if the step was skipped."""
        forget_fp8_weights(self.policy.module)  # they are of other weights, and an update begins as a step does
        sums = self._accumulate(microbatches, *given)
        return sums | {"grad_norm": self._step(finite=math.isfinite(sums["loss"]) and sums["kept"] > 0)}

    def _given(self, updates: Sequence[Sequence[Microbatch]]) -> list[tuple[Scores, Scores]]:
        """What each update's loss takes as given: the old policy's log-probabilities, and the reference's.

        The first update has no old policy but its own. The reference does its own routing: sent to the experts of
        another model's router it would be no fixed model.
        """
        old = [Scores(), *(self.policy.logprobs(microbatches) for microbatches in updates[1:])]
        if self._reference is None:
            return [(scores, Scores()) for scores in old]
        with self._reference.swapped_in():
            own = [[replace(microbatch, routed_experts=None) for microbatch in update] for update in updates]
            return list(zip(old, map(self.policy.logprobs, own), strict=True))

    def _accumulate(self, microbatches: Sequence[Microbatch], old: Scores, reference: Scores) -> dict[str, float]:
        """Accumulates an update's gradient in the buffers; returns its `METRICS`."""
        self.optimizer.zero_gradients()

        def loss(microbatch: Microbatch, logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
            rows = microbatch.rows
            return self._objective(logprobs, microbatch.targets, reference.get(rows), entropies, old.get(rows))

        sums = self._sum(self.policy.pipeline.run(self.optimizer.model, microbatches, loss, train=True))
        if 0 < sums["kept"] < sums["counted"]:  # rejected tokens leave the denominators of the whole update
            scale = sums["counted"] / sums["kept"]
            self.optimizer.scale_gradients(scale)
            sums |= {name: sums[name] * scale for name in ("loss", "kl")}
        return sums

    def _sum(self, metrics: Sequence[Tensor]) -> dict[str, float]:
        """Sums the last stages' metrics over microbatches and data-parallel ranks."""
        total = torch.zeros(len(METRICS), dtype=torch.float64, device=self.policy.world.device)
        if metrics and parallel_state.get_tensor_model_parallel_rank() == 0:  # all of a tensor-parallel group are alike
            total += torch.stack(list(metrics)).sum(0)
        dist.all_reduce(total)
        return dict(zip(METRICS, total.tolist(), strict=True))

    def _step(self, finite: bool) -> float:
        """Clips and steps; returns the gradient norm, or NaN if the step is skipped."""
        grad_norm = self.optimizer.gradient_norm()
        if not (finite and math.isfinite(grad_norm)):
            return math.nan
        self.optimizer.step(grad_norm)
        self.policy.version += 1
        return grad_norm

    def held(self) -> dict[str, int]:
        """Bytes that this rank holds, by what they are for; what is offloaded counts as the host's."""
        away = " on the host" if self.policy.config.actor.offload_optimizer else ""
        return {
            "weights": sum(parameter.nbytes for parameter in self.policy.module.parameters()),
            **self.optimizer.held(),
            "activations and other work, peak": self._working_bytes,
            "reference" + away: 0 if self._start is None else self._start.nbytes,
        }


@contextmanager
def on_stream(own: torch.cuda.Stream) -> Iterator[None]:
    """Queues what happens inside on `own`: after all that is queued so far, and before what comes next.

    vLLM may have made another stream the process's current one.
    """
    outside = torch.cuda.current_stream()
    own.wait_stream(outside)
    with torch.cuda.stream(own):
        yield
    outside.wait_stream(own)
