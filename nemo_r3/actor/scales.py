"""The scales of FP8's delayed scaling, which come from earlier passes: finding the first ones, and checkpointing them.

Transformer Engine pickles them and then refuses to load pickles; here they are safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_recipe
from safetensors.torch import load, save
from torch import Tensor

from nemo_r3.runtime import World

FORWARD, BACKWARD = "scaling_fwd", "scaling_bwd"
"""Where Transformer Engine keeps a layer's scales: in its `fp8_meta`, for inputs and weights, and for gradients."""
KEPT = ("scale", "amax_history")


def keep_scales(module: Any, delayed: bool) -> None:
    """Makes Transformer Engine's layers save and load their scales as bytes of safetensors.

    Any recipe but delayed scaling saves none, and ignores those in a checkpoint.
    """
    recipe = get_fp8_recipe(module.config) if delayed else None
    for part in module.modules():
        if hasattr(part, "fp8_meta"):
            part.get_extra_state = partial(_scales, part)
            part.set_extra_state = partial(_take, part, recipe)


def find_scales(layers: Any, world: World, accumulate: Callable[[], object]) -> None:
    """Runs `accumulate` twice, forward and backward of a microbatch, unless a checkpoint brought the scales.

    With the initial scales of 1, gradients round to zero. The first pass sees the gradients of the residual stream; the
    second no longer loses these, and sees what is behind them. The gradients of both are thrown away, so no forward
    hook of the layers, which may measure them, sees either.
    """
    if not any(world.gather(_knows_scales(layers))):
        with _without_hooks(layers):
            accumulate()
            accumulate()


@contextmanager
def _without_hooks(layers: Any) -> Iterator[None]:
    held = [(part._forward_hooks, dict(part._forward_hooks)) for part in layers.modules()]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in held:
            hooks.update(before)


def _knows_scales(layers: Any) -> bool:
    """Whether one of them has seen a gradient."""
    held = (part.fp8_meta.get(BACKWARD) for part in layers.modules() if hasattr(part, "fp8_meta"))
    return any(bool(way.amax_history.any()) for way in held if way is not None)


def _scales(part: Any) -> Tensor:
    """[bytes] uint8 on the CPU; empty before the first step."""
    tensors = {name: tensor.cpu() for name, tensor in _tensors(part)}
    if not tensors:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)


def _take(part: Any, recipe: Any, state: Tensor) -> None:
    if recipe is None or not state.numel():
        return
    part.fp8_meta |= {"recipe": recipe, "num_gemms": 1}  # each of our layers multiplies by one matrix
    part.init_fp8_meta_tensors(recipe)
    saved = load(state.cpu().numpy().tobytes())
    for name, tensor in _tensors(part):
        tensor.copy_(saved[name])


def _tensors(part: Any) -> Iterator[tuple[str, Tensor]]:
    for way in (FORWARD, BACKWARD):
        held = part.fp8_meta.get(way)
        yield from ((f"{way}.{name}", getattr(held, name)) for name in KEPT if hasattr(held, name))
