"""The scales that delayed scaling takes from what came before: whether it has any, and how a checkpoint keeps them.

Transformer Engine pickles them, and refuses to read what it has pickled; here they are safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_recipe
from safetensors.torch import load, save
from torch import Tensor

from nemo_r3.runtime import World

FORWARD, BACKWARD = "scaling_fwd", "scaling_bwd"
KEPT = ("scale", "amax_history")


def keep_scales(module: Any, delayed: bool) -> None:
    """Has Transformer Engine's layers give and take their scales as bytes of safetensors.

    Args:
        module: the policy's modules.
        delayed: whether its recipe is delayed scaling; under another one no scales are given, and given ones not taken.
    """
    recipe = get_fp8_recipe(module.config) if delayed else None
    for part in module.modules():
        if hasattr(part, "fp8_meta"):
            part.get_extra_state = partial(_scales, part)
            part.set_extra_state = partial(_take, part, recipe)


def find_scales(module: Any, world: World, accumulate: Callable[[], object]) -> None:
    """Delayed scaling begins with passes whose gradient is thrown away, unless a checkpoint brought its scales.

    With scales of 1 gradients round to zero. The first pass sees those that come from the residual stream, the
    second, which no longer loses them, what is behind.

    Args:
        module: the policy's modules.
        world: all ranks.
        accumulate: runs a microbatch forward and backward.
    """
    if not any(world.gather(_knows_scales(module))):
        accumulate()
        accumulate()


def _knows_scales(module: Any) -> bool:
    """Whether a layer has seen a gradient."""
    held = (part.fp8_meta.get(BACKWARD) for part in module.modules() if hasattr(part, "fp8_meta"))
    return any(bool(way.amax_history.any()) for way in held if way is not None)


def _scales(part: Any) -> Tensor:
    """[bytes] uint8 on the CPU; none before the first step."""
    found = {name: tensor.cpu() for name, tensor in _tensors(part)}
    return torch.frombuffer(bytearray(save(found)), dtype=torch.uint8) if found else torch.empty(0, dtype=torch.uint8)


def _take(part: Any, recipe: Any, state: Tensor) -> None:
    if recipe is None or not state.numel():
        return
    part.fp8_meta |= {"recipe": recipe, "num_gemms": 1}  # a layer of ours multiplies by one matrix
    part.init_fp8_meta_tensors(recipe)
    found = load(state.cpu().numpy().tobytes())
    for name, tensor in _tensors(part):
        tensor.copy_(found[name])


def _tensors(part: Any) -> Iterator[tuple[str, Tensor]]:
    for way in (FORWARD, BACKWARD):
        held = part.fp8_meta.get(way)
        yield from ((f"{way}.{name}", getattr(held, name)) for name in KEPT if hasattr(held, name))
