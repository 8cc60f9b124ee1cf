"""What rounding to FP8 costs each layer, and how a layer leaves FP8.

The operands of a layer's four matrices are watched: inputs, weights, and the gradients of outputs, rounded as the
recipe rounds them (without FP8: as `fp8-tensorwise` would). In a layer with experts, only attention's two are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nemo_r3.precision import TENSORWISE, Recipe, Tile
from nemo_r3.runtime import World

MATRICES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
WEIGHT = "weight"
OPERANDS = {"input": ("scaling_fwd", 0), WEIGHT: ("scaling_fwd", 1), "gradient": ("scaling_bwd", 0)}
"""The operands, and where Transformer Engine keeps the scale that delayed scaling took from earlier steps."""
CHUNK = 2**22
"""Numbers that are rounded at a time."""

Key = tuple[int, str, str]
"""Layer, counted from 0 over all stages; matrix; operand."""


@dataclass
class Rounding:
    """What rounding did to one operand, summed over microbatches and ranks."""

    amax: float = 0.0  # the largest magnitude
    numbers: float = 0.0  # how many numbers were not zero
    underflows: float = 0.0  # how many of these were rounded to zero
    saturated: float = 0.0  # how many of these exceeded the format's largest number
    error: float = 0.0  # sum of squares of what rounding changed
    square: float = 0.0  # sum of squares of the numbers

    def add(self, other: Rounding) -> None:
        """Adds another part of the same operand."""
        self.amax = math.nan if math.isnan(self.amax + other.amax) else max(self.amax, other.amax)
        self.numbers += other.numbers
        self.underflows += other.underflows
        self.saturated += other.saturated
        self.error += other.error
        self.square += other.square

    def shares(self) -> dict[str, float]:
        """`amax`; `underflow` and `saturation` as shares of the numbers; `error`, relative (Frobenius)."""
        numbers, square = max(self.numbers, 1.0), self.square or 1.0
        return {
            "amax": self.amax,
            "underflow": self.underflows / numbers,
            "saturation": self.saturated / numbers,
            "error": math.sqrt(self.error / square),
        }


class LayerWatch:
    """Watches the layers of this rank's stage through one step at a time."""

    def __init__(self, trunk: Any, recipe: Recipe | None) -> None:
        """Touches nothing before `watching`; `recipe` is the run's, None without FP8."""
        self._layers = {layer.layer_number - 1: layer for layer in trunk.decoder.layers}
        self._recipe = recipe or TENSORWISE
        end = trunk.config.num_layers
        edge = end if recipe is None else recipe.edges
        self._plain = {number for number in self._layers if number < edge or number >= end - edge}
        self._roundings: dict[Key, Rounding] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measures what passes through the layers inside this block, wherever gradients are on."""
        self._roundings = {}
        handles = [
            part.register_forward_hook(partial(self._seen, number, name))
            for number, layer in self._layers.items()
            for name, part in layer.named_modules()
            if name in MATRICES
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def rows(self, world: World) -> list[dict[str, Any]]:
        """What was measured on all ranks: a row per layer, matrix and operand, with `Rounding.shares` and `fp8`.

        Every rank calls this. The padding of packed rows counts among the inputs, as it does for a recipe's scales.
        """
        whole: dict[Key, Rounding] = {}
        for part in world.gather(self._roundings):
            for key, rounding in part.items():
                whole.setdefault(key, Rounding()).add(rounding)
        plain = {number for part in world.gather(self._plain) for number in part}
        return [
            {"layer": layer, "matrix": matrix, "operand": operand, "fp8": layer not in plain} | rounding.shares()
            for (layer, matrix, operand), rounding in sorted(whole.items())
        ]

    def leave_fp8(self, layers: Collection[int]) -> None:
        """Makes these layers multiply in BF16 from now on; a stage takes care of its own."""
        for number in set(layers) & set(self._layers) - self._plain:
            self._plain.add(number)
            layer = self._layers[number]
            layer.forward = _without_fp8(layer.forward)

    def _seen(self, number: int, matrix: str, module: Any, inputs: Sequence[Tensor], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        self._take((number, matrix, "input"), module, read_by(module, inputs[0]))
        if (number, matrix, WEIGHT) not in self._roundings:
            self._take((number, matrix, WEIGHT), module, module.weight)
        product = output[0] if isinstance(output, tuple) else output
        product.register_hook(partial(self._take, (number, matrix, "gradient"), module))

    def _take(self, key: Key, module: Any, tensor: Tensor) -> None:
        recipe, operand = self._recipe, key[-1]
        dtype = torch.float8_e5m2 if operand == "gradient" and recipe.format == "hybrid" else torch.float8_e4m3fn
        scale = None
        if recipe.delayed and key[0] not in self._plain:
            held, place = OPERANDS[operand]
            scale = module.fp8_meta[held].scale[place]
        tile = recipe.weight_tile if operand == WEIGHT else recipe.tile
        measured = measure_rounding(tensor.detach(), dtype, tile, recipe.powers_of_two, scale)
        self._roundings.setdefault(key, Rounding()).add(measured)


def measure_rounding(
    tensor: Tensor,
    dtype: torch.dtype,
    tile: Tile | None = None,
    powers_of_two: bool = False,
    scale: Tensor | None = None,
) -> Rounding:
    """What rounding to an FP8 format does to a tensor.

    Args:
        tensor: [.., columns], of any float dtype.
        dtype: the format.
        tile: rows and columns that share one scale, which maps their amax to the format's maximum; None: one scale
            for the whole tensor.
        powers_of_two: round scales down to powers of two.
        scale: of the whole tensor, instead of its amax's.
    """
    rows, largest = tensor.reshape(-1, tensor.shape[-1]), torch.finfo(dtype).max
    height = 1 if tile is None else tile[0]
    parts = rows.split(max(CHUNK // rows.shape[1] // height, 1) * height)
    amax = torch.stack([part.abs().amax() for part in parts]).amax().float()
    whole = _scale(amax, largest, powers_of_two) if scale is None else scale
    sums = torch.zeros(5, dtype=torch.float64, device=tensor.device)
    for part in parts:
        numbers = part.float()
        scales = whole if tile is None else _spread(numbers, tile, largest, powers_of_two)
        back, filled = _there_and_back(numbers, scales, dtype), numbers != 0
        counts = (filled, filled & (back == 0), (numbers * scales).abs() > largest * (1 + 1e-6))
        sums += torch.stack([count.sum() for count in counts] + [((back - numbers) ** 2).sum(), (numbers**2).sum()])
    return Rounding(float(amax), *sums.tolist())


def rounded(tensor: Tensor, dtype: torch.dtype, tile: Tile | None = None) -> Tensor:
    """A float32 tensor [.., columns] as it comes back from an FP8 format; `tile` as in `measure_rounding`."""
    rows, largest = tensor.reshape(-1, tensor.shape[-1]), torch.finfo(dtype).max
    scales = _scale(rows.abs().amax(), largest) if tile is None else _spread(rows, tile, largest)
    return _there_and_back(rows, scales, dtype).view_as(tensor)


def _there_and_back(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return (numbers * scales).clamp(-largest, largest).to(dtype).float() / scales


def _scale(amax: Tensor, largest: float, powers_of_two: bool = False) -> Tensor:
    scale = largest / amax.clamp(min=torch.finfo(torch.float32).tiny)
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    return torch.exp2(scale.log2().floor()) if powers_of_two else scale


def _spread(numbers: Tensor, tile: Tile, largest: float, powers_of_two: bool = False) -> Tensor:
    """[rows, columns]: each number's scale, from the largest of its tile; edges make smaller tiles."""
    (count, columns), (height, width) = numbers.shape, tile
    padded = nn.functional.pad(numbers.abs(), (0, -columns % width, 0, -count % height))
    tiles = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    scales = _scale(tiles.amax((1, 3)), largest, powers_of_two)
    return scales.repeat_interleave(height, 0).repeat_interleave(width, 1)[:count, :columns]


def read_by(part: Any, inputs: Tensor) -> Tensor:
    """What a layer's matrix multiplies [.., columns], detached: its inputs, or their norm, where that is folded in."""
    weight, inputs = getattr(part, "layer_norm_weight", None), inputs.detach()
    return inputs if weight is None else nn.functional.rms_norm(inputs, weight.shape, weight.detach(), part.eps)


def _without_fp8(forward: Callable[..., Any]) -> Callable[..., Any]:
    from transformer_engine.pytorch import fp8_autocast

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with fp8_autocast(enabled=False):
            return forward(*args, **kwargs)

    return wrapped
