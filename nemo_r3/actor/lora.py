"""LoRA (arXiv 2106.09685): the layers' matrices change by products of two thin ones, and these alone are trained.

    W = W0 + alpha / rank * B A     A [rank, columns] at random, B [rows, rank] at first 0, both float32

The sum is the model's weight. Passes, FP8, refit and export read it like any other, so what is sampled is what is
trained. No weight has a gradient, only the factors have (`lora_gradient.py`), and so has AdamW's state only theirs.
Embedding, norms, biases and head stay as they are, and so do routers and experts: of a layer with experts, LoRA trains
the attention's matrices.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, nn

from nemo_r3.actor.checkpoint_writer import OPTIMIZER
from nemo_r3.actor.lora_gradient import gradients, tap
from nemo_r3.actor.model import Trunk
from nemo_r3.actor.optimizer import start_adam_state
from nemo_r3.actor.reference import Reference
from nemo_r3.actor.weights import parameters_by_name
from nemo_r3.config import Config
from nemo_r3.models import Architecture, convert, names
from nemo_r3.models.names import NameRow
from nemo_r3.runtime import World


@dataclass(frozen=True)
class Factor:
    """This rank's part of one A or B."""

    name: str  # of the Hugging Face tensor, with .lora_A or .lora_B
    value: nn.Parameter  # float32
    cut: int | None  # the axis that tensor parallelism cuts; None if every rank holds the whole


@dataclass(frozen=True)
class Site:
    """A parameter of this rank that changes, and the factors of the matrices that it is made of."""

    row: NameRow
    weight: nn.Parameter
    part: nn.Module  # the layer whose weight it is
    pairs: tuple[tuple[Factor, Factor], ...]  # A and B of each, in the order of `convert.merge`


class Lora:
    """The factors of this rank's stage.

    Attributes:
        module: the stage, none of whose parameters requires a gradient any more.
        sites: its parameters that change.
    """

    def __init__(self, module: Trunk, arch: Architecture, config: Config) -> None:
        """Makes the factors of a stage with the starting weights, which their product leaves as they are for now."""
        rank = config.actor.lora_rank
        self.module = module
        self._arch, self._scale = arch, config.actor.lora_alpha / rank
        self._ways = parallel_state.get_tensor_model_parallel_world_size()
        mine = parameters_by_name(module, arch)
        parts = {parameter: part for part in module.modules() for parameter in part.parameters(recurse=False)}
        self.sites = []
        for row in names.rows(arch):
            weight, matrices = mine.get(row.megatron), names.matrices(row, arch)
            if weight is not None and matrices:
                pairs = tuple(self._new_pair(row, name, shape, rank, config.seed) for name, shape in matrices)
                self.sites.append(Site(row, weight, parts[weight], pairs))
        module.requires_grad_(False)

    def _new_pair(self, row: NameRow, name: str, shape: tuple[int, int], rank: int, seed: int) -> tuple[Factor, Factor]:
        """A matrix's A, uniform within 1 / sqrt(columns) and the same in every layout, and its B, zeros."""
        rows, columns = shape
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        a = (torch.rand(rank, columns, generator=draw) * 2 - 1) / math.sqrt(columns)
        b = torch.zeros(rows, rank)
        mine, device = parallel_state.get_tensor_model_parallel_rank(), next(self.module.parameters()).device

        def part(end: str, whole: Tensor, cut: int | None) -> Factor:
            own = whole if cut is None else whole.chunk(self._ways, dim=cut)[mine]
            return Factor(name + end, nn.Parameter(own.contiguous().to(device)), cut)

        cut_a, cut_b = (None, 0) if row.cut == 0 else (1, None)
        return part(".lora_A", a, cut_a), part(".lora_B", b, cut_b)

    def factors(self) -> Iterator[Factor]:
        """All of this rank's."""
        return (factor for site in self.sites for pair in site.pairs for factor in pair)

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the products to the weights, which must be the starting ones."""
        for site in self.sites:
            thick_a, thick_b = self._thick(site)
            site.weight.copy_(site.weight.float().addmm_(thick_b, thick_a, alpha=self._scale))

    def _thick(self, site: Site) -> tuple[Tensor, Tensor]:
        """A site's factors as those of one matrix, its weight: A has theirs one below the other, and B in blocks."""
        thick_a = torch.cat([a.value for a, _ in site.pairs])
        blocks = torch.block_diag(*(b.value for _, b in site.pairs)).split([len(b.value) for _, b in site.pairs])
        return thick_a, convert.merge(site.row, blocks, self._arch, self._ways)

    def take_gradient(self, site: Site, x: Tensor, dy: Tensor) -> None:
        """Adds to the gradients of a site's factors.

        Its n matrices are done at once, as one with factors n times as thick. Of B's gradient the blocks count.

        Args:
            site: one of `sites`.
            x: [tokens, columns], what its weight reads; as `gradients` takes it.
            dy: [tokens, rows], the gradient of what its weight gives; the same.
        """
        row, pairs = site.row, site.pairs
        assert row.cut is not None, "tensor parallelism cuts every matrix that LoRA changes"
        da, db = gradients(x, *self._thick(site), dy, row.cut, self.module.config.sequence_parallel)
        each = zip(pairs, da.chunk(len(pairs)), db.chunk(len(pairs), dim=1), strict=True)
        for number, ((a, b), own_da, own_db) in enumerate(each):
            block = convert.separate(row, own_db, self._arch, self._ways)[number]
            a.value.grad.add_(own_da, alpha=self._scale)  # type: ignore[union-attr]
            b.value.grad.add_(block, alpha=self._scale)  # type: ignore[union-attr]

    def whole(self, world: World) -> dict[str, Tensor]:
        """The factors of all stages by name, whole and on the CPU, on rank 0; none elsewhere. Every rank calls this."""
        rank, first = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank() == 0
        mine = {
            (factor.name, rank): (factor.cut or 0, factor.value.detach().to("cpu", copy=True))  # no view of a whole
            for factor in self.factors()
            if first and (rank == 0 or factor.cut is not None)
        }
        parts, axes = defaultdict(list), {}
        for (name, _), (axis, part) in sorted(world.merge_on_main(mine).items(), key=lambda item: item[0]):
            parts[name].append(part)
            axes[name] = axis
        return {name: torch.cat(found, dim=axes[name]) for name, found in parts.items()}

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """The factors as parts of a checkpoint, which share their memory."""
        return {factor.name: sharded(factor, factor.name, factor.value.detach()) for factor in self.factors()}


def sharded(factor: Factor, key: str, data: Tensor) -> ShardedTensor:
    """A tensor that is cut as a factor is, as a part of a checkpoint."""
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    cuts = [] if factor.cut is None else [(factor.cut, rank, size)]
    replica = (0, rank if factor.cut is None else 0, parallel_state.get_data_parallel_rank())
    return ShardedTensor.from_rank_offsets(key, data, *cuts, replica_id=replica)


class LoraOptimizer:
    """Trains the factors; every data-parallel rank holds all of AdamW's state, which is small.

    Attributes:
        model: the stage, which the pipeline has to run.
    """

    def __init__(self, lora: Lora, start: Reference, config: Config) -> None:
        """Begins without gradients and moments; `start` has the weights that the factors' products are added to."""
        self.model = lora.module
        self._lora, self._start, actor = lora, start, config.actor
        self._clip = actor.clip_grad
        factors = sorted(lora.factors(), key=lambda factor: factor.cut is None)  # those that are cut come first
        sizes = [factor.value.numel() for factor in factors]
        self._num_cut = sum(size for factor, size in zip(factors, sizes, strict=True) if factor.cut is not None)
        self._gradients = torch.zeros(sum(sizes), device=factors[0].value.device)
        for factor, part in zip(factors, self._gradients.split(sizes), strict=True):
            factor.value.grad = part.view_as(factor.value)
        self._adam = torch.optim.AdamW(
            [factor.value for factor in factors],
            betas=(actor.adam_beta1, actor.adam_beta2),
            eps=actor.adam_eps,
            fused=True,
        )
        start_adam_state(self._adam)
        self.model.config.finalize_model_grads_func = self._sum_gradients
        for site in lora.sites:
            tap(site.part, partial(lora.take_gradient, site))
        if self.model.pre_process:
            self.model.embedding.register_forward_hook(_track)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """AdamW's, whose learning rate and weight decay a schedule sets."""
        return self._adam.param_groups

    def zero_gradients(self) -> None:
        """Before the first microbatch of an update."""
        self._gradients.zero_()

    def scale_gradients(self, factor: float) -> None:
        """Multiplies what an update has summed."""
        self._gradients *= factor

    def _sum_gradients(self, *_: Any, **groups: Any) -> None:
        """After the last microbatch. Of a factor that is whole on each tensor-parallel rank, each has seen a part."""
        dist.all_reduce(self._gradients[self._num_cut :], group=parallel_state.get_tensor_model_parallel_group())
        dist.all_reduce(self._gradients, group=parallel_state.get_data_parallel_group(with_context_parallel=True))

    def gradient_norm(self) -> float:
        """Over all ranks; `step` comes next, or nothing."""
        counted = self._num_cut if parallel_state.get_tensor_model_parallel_rank() else len(self._gradients)
        square = torch.linalg.vector_norm(self._gradients[:counted], dtype=torch.float64).square()
        for group in (
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
        ):
            dist.all_reduce(square, group=group)
        return math.sqrt(square.item())

    def step(self, norm: float) -> None:
        """Clips gradients of this `gradient_norm`, changes the factors, and the weights with them."""
        if self._clip:
            self._gradients *= min(1.0, self._clip / (norm + 1e-6))
        self._adam.step()
        self._merge()

    def _merge(self) -> None:
        self._start.restore()
        self._lora.merge()

    def park(self) -> None:
        """There is nothing worth moving."""

    def restore(self) -> None:
        """Nothing was moved."""

    def held(self) -> dict[str, int]:
        """Bytes that this rank holds, by what they are for."""
        return {
            "gradients": self._gradients.nbytes,
            "optimizer state": 3 * self._gradients.nbytes,  # the factors and their moments
        }

    def sharded_state(self, _: Mapping[str, Any]) -> list[ShardedTensor]:
        """This rank's parts of a checkpoint's optimizer state: the factors' moments."""
        return [
            sharded(factor, ".".join((OPTIMIZER, "state", name, factor.name)), self._adam.state[factor.value][name])
            for factor in self._lora.factors()
            for name in ("exp_avg", "exp_avg_sq")
        ]

    def loaded(self, step: int) -> None:
        """After a checkpoint was read into factors and state, which has seen so many steps."""
        for state in self._adam.state.values():
            state["step"].fill_(step)
        self._merge()


def _track(_: nn.Module, inputs: Any, hidden: Tensor) -> None:
    """Makes the embedding's output require gradients, as no weight does: from what has none a layer passes none on."""
    if torch.is_grad_enabled():
        hidden.requires_grad_()
