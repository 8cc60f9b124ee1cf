"""Weights in and out of this rank's shard, through the family's two-way name table.

`load_hf` reads only what this rank holds. `export_hf` is a stream in which every rank takes part in lockstep: for each
row of the table, the ranks of the owning pipeline stage send their parts to their peers in the other stages, then every
stage gathers the full tensor from its tensor-parallel ranks. Of experts, the owning stage first gathers one from each
expert-parallel rank. Between stages, which may be on different nodes, only parts travel, and no rank ever holds more
than one full parameter, or these experts', beside its shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from nemo_r3 import watchdog
from nemo_r3.models import Architecture, convert, names
from nemo_r3.models.tensors import HFTensors


def parameters_by_name(model: nn.Module, arch: Architecture) -> dict[str, nn.Parameter]:
    """This rank's parameters under their global names (layers and experts counted over all ranks)."""
    rows = names.rows(arch)
    canonical = {names.fused_norm_name(row.megatron): row.megatron for row in rows}
    first_layer = model.decoder.layers[0].layer_number - 1  # type: ignore[union-attr, index, operator]
    first_expert = 0
    if arch.experts is not None:
        group = parallel_state.get_expert_model_parallel_group()
        first_expert = group.rank() * (arch.experts.count // group.size())
    found = {}
    for name, parameter in model.named_parameters():
        name = names.global_name(name, first_layer, first_expert)
        found[canonical.get(name, name)] = parameter
    return found


def mark_tensor_parallel(model: nn.Module, arch: Architecture) -> None:
    """Tells megatron-core which parameters are cut, so that gradient norms count each element once.

    megatron-core sets these attributes only where it initialises weights itself.
    """
    mine: dict[str, Any] = dict(parameters_by_name(model, arch))
    cuts = {row.megatron: row.cut for row in names.rows(arch)} | {names.HEAD: 0}
    for name, parameter in mine.items():
        cut = cuts[name]
        parameter.tensor_model_parallel = cut is not None
        parameter.partition_dim = -1 if cut is None else cut
        parameter.partition_stride = 1


def load_hf(model: nn.Module, arch: Architecture, path: Path) -> None:
    """Fills this rank's parameters from a Hugging Face checkpoint's safetensors.

    Raises:
        ConfigError: no safetensors, an unreadable one, or a tensor that is missing or of another shape.
    """
    mine = parameters_by_name(model, arch)
    with HFTensors(path) as checkpoint, torch.no_grad():
        checkpoint.check(arch)
        for row in names.rows(arch):
            watchdog.alive()
            targets = [mine[row.megatron]] if row.megatron in mine else []
            if arch.tied and row.megatron == names.EMBEDDING and names.HEAD in mine:
                targets.append(mine[names.HEAD])  # the last stage's copy of a tied embedding
            if not targets:
                continue
            group = _sharing(row)
            pieces = [checkpoint.read(*piece) for piece in names.pieces(row, arch, group.rank(), group.size())]
            part = convert.merge(row, pieces, arch, group.size())
            for target in targets:
                target.copy_(part)


def export_hf(model: nn.Module, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Streams (Hugging Face name, full tensor in the actor's dtype) pairs; every rank must iterate to the end."""
    mine = parameters_by_name(model, arch)
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    ep_group = parallel_state.get_expert_model_parallel_group()
    sample = next(iter(mine.values()))
    for rows in names.side_by_side(arch, ep_group.size()):
        first, tp_group = rows[0], _sharing(rows[0])
        stage = names.stage_of(first, arch, pp_group.size())
        if stage == pp_group.rank():
            (own,) = (mine[row.megatron].detach().contiguous() for row in rows if row.megatron in mine)
            parts = own if len(rows) == 1 else _gather(own, ep_group)
        else:
            rank_rows, *others = names.part_shape(first, arch, tp_group.size())
            parts = torch.empty(len(rows) * rank_rows, *others, dtype=sample.dtype, device=sample.device)
        _hand_on(parts, stage, pp_group)
        for row, part in zip(rows, parts.chunk(len(rows)), strict=True):
            full = part if row.cut is None else convert.join(row, _gather(part, tp_group), tp_group.size())
            yield from zip(row.hf, convert.split(row, full, arch), strict=True)


def _sharing(row: names.NameRow) -> dist.ProcessGroup:
    """The ranks over which a row's tensor is cut, if it is."""
    if row.expert is None:
        return parallel_state.get_tensor_model_parallel_group()
    return parallel_state.get_expert_tensor_parallel_group()


def _hand_on(part: Tensor, owner: int, group: dist.ProcessGroup) -> None:
    """Fills `part` with that of the group's rank `owner`, on all of its ranks."""
    if group.size() > 1:
        dist.broadcast(part, src=dist.get_global_rank(group, owner), group=group)


def _gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The parts of all ranks, one after the other along axis 0."""
    if group.size() == 1:
        return part
    parts = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
    dist.all_gather_into_tensor(parts, part, group=group)
    return parts
