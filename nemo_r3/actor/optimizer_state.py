"""The optimizer's state in a checkpoint: every rank writes its own part, and reads it back in place.

The distributed optimizer cuts its buffers into equal parts, which may end within a parameter. A rank's part of a
parameter becomes at most three rectangles of the whole tensor here: the end of a row, whole rows, the beginning of a
row. torch's checkpoint format stores any rectangles and can read any others from them, so any layout can load it.
megatron-core's own way gathers whole parameters first, which takes one rank up to 36 bytes of host memory for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from nemo_r3.actor.checkpoint_writer import OPTIMIZER

STATES = ("param", "exp_avg", "exp_avg_sq")
"""fp32 main weights and AdamW's moments."""


def sharded_state(optimizer: MegatronOptimizer, weights: Mapping[str, Any]) -> list[ShardedTensor]:
    """This rank's main weights and moments as parts of a checkpoint, which share the optimizer's memory.

    `weights` is the model's sharded state.
    """
    tensors, _ = extract_sharded_tensors_and_factories(weights)
    by_parameter = {weight.data: weight for weight in nested_values(tensors)}
    return [
        part
        for chained in optimizer.chained_optimizers
        for parameter in getattr(chained, "model_param_gbuf_map", ())  # a stage may have no parameters
        for part in _parts(chained, parameter, by_parameter[parameter])
    ]


def set_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Tells Adam how many steps its moments have seen.

    torch's keeps that per parameter; Transformer Engine's per group, and only after its first step.
    """
    for chained in optimizer.chained_optimizers:
        if chained.optimizer is None:
            continue
        for state in chained.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(step)
        for group in chained.optimizer.param_groups:
            group["step"] = step


def _parts(optimizer: DistributedOptimizer, parameter: Tensor, weight: Any) -> Iterator[ShardedTensor]:
    """The parts of one parameter's state that this rank holds."""
    own = optimizer._get_model_param_range_map(parameter)["param"]
    states = optimizer._get_main_param_and_optimizer_states(parameter)
    for piece in weight.build() if isinstance(weight, ShardedTensorFactory) else [weight]:
        begin = piece.data.storage_offset() - parameter.storage_offset()
        first, end = max(own.start, begin), min(own.end, begin + piece.data.numel())
        for offset, size in rectangles(first - begin, end - begin, piece.local_shape):
            count = math.prod(size)
            for name in STATES:
                yield _part(piece, name, states[name].detach()[first - own.start :][:count], offset, size)
            first += count


def _part(piece: ShardedTensor, name: str, flat: Tensor, offset: Sequence[int], size: Sequence[int]) -> ShardedTensor:
    """A rectangle of one state: `flat` are its [count] numbers, `offset` is where it begins in the piece.

    megatron-core stores equal layers as one tensor with leading axes. Here every layer is a tensor of its own: rank 0
    compares the parts of a tensor pairwise before a save, so its time would grow with the square of the layers.
    """
    axes = piece.prepend_axis_num
    layer, begin = piece.global_offset[:axes], piece.global_offset[axes:]
    return replace(
        piece,
        key=".".join((OPTIMIZER, "state", name, piece.key, *map(str, layer))),
        data=flat.view(tuple(size)),
        dtype=flat.dtype,
        local_shape=tuple(size),
        global_shape=piece.global_shape[axes:],
        global_offset=tuple(start + more for start, more in zip(begin, offset, strict=True)),
        axis_fragmentations=None,
        prepend_axis_num=0,
        replica_id=(*piece.replica_id[:2], 0),  # no other data-parallel rank holds it
    )


def rectangles(first: int, end: int, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the rectangles that hold elements `first` to `end` of a row-major tensor, in order.

    Args:
        first: index of the first element.
        end: index after the last one; if it is not above `first`, there are none.
        shape: [length] or [rows, width].
    """
    if first >= end:
        return
    if len(shape) == 1:
        yield (first,), (end - first,)
        return
    _, width = shape
    while first < end:
        row, column = divmod(first, width)
        rows = (end - first) // width if column == 0 else 0
        size = (rows, width) if rows else (1, min(width - column, end - first))
        yield (row, column), size
        first += math.prod(size)
