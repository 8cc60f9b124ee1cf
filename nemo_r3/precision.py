"""`Precision`: the arithmetic of a run, for both the actor and the rollout.

    actor.precision -> Precision -> fields of megatron-core's configs, length of packed rows, environment, vLLM's dtype
                           `-> Recipe (FP8): how Transformer Engine scales, and what that needs of machine and model

With FP8, the matrices of the layers are multiplied in FP8. Embedding, norms, attention, head and sums of gradients are
not; neither are the first and last layer, if the recipe can leave them out. The weights stay BF16, because refit,
export, reference and checkpoints read them: they must not get what was rounded for one recipe's scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nemo_r3.config import ActorConfig, Config

if TYPE_CHECKING:
    import torch

Version = tuple[int, ...]
Tile = tuple[int, int]
"""Rows and columns of a matrix that share a scale."""


@dataclass(frozen=True)
class Recipe:
    """One of Transformer Engine's ways to scale numbers into FP8."""

    name: str  # megatron-core's name
    format: str  # "e4m3", or "hybrid" with gradients in e5m2, whose range is larger
    row_multiple: int  # the length of a packed row, in tokens, must be a multiple of this
    block: int  # every dimension of a layer's matrices on a rank must be a multiple of this
    edges: int  # layers at each end of the model that stay BF16; 0 if the recipe cannot leave any out
    te: Version  # the oldest Transformer Engine that has it
    cuda: Version  # the oldest CUDA
    capabilities: tuple[Version, Version]  # supported range [first, last) of CUDA compute capabilities
    environment: tuple[tuple[str, str], ...] = ()  # variables that must be set when Transformer Engine is imported
    tile: Tile | None = None  # what shares a scale in inputs and gradients; None for the whole tensor
    weight_tile: Tile | None = None  # the same in weights
    powers_of_two: bool = False  # whether scales are rounded to powers of two
    delayed: bool = False  # whether scales come from earlier steps' amax, and so can be wrong for the current one

    def runs_on(self, capability: Version) -> bool:
        """Whether a GPU of this CUDA compute capability can do it."""
        first, last = self.capabilities
        return first <= capability < last


@dataclass(frozen=True)
class Precision:
    """What one name of `actor.precision` stands for."""

    name: str  # the setting
    dtype_name: str  # of parameters and activations, for torch and vLLM; main weights, gradients and moments stay fp32
    fp8: Recipe | None = None  # how the layers' matrices are multiplied in FP8; None if they are not

    @property
    def dtype(self) -> torch.dtype:
        """That of the name."""
        import torch  # plans do without

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def bf16(self) -> bool:
        """Whether megatron-core must keep fp32 main weights beside bf16 ones."""
        return self.dtype_name == "bfloat16"

    @property
    def width(self) -> int:
        """Bytes of a weight, in the actor and in the engine."""
        return 2 if self.bf16 else 4

    def row_multiple(self, actor: ActorConfig) -> int:
        """What the length of every packed row, in tokens, must be a multiple of.

        With FP8 that is the recipe's multiple, and 8 on each tensor-parallel rank: Transformer Engine checks the tokens
        before sequence parallelism gathers them.
        """
        if self.fp8 is None:
            return actor.tensor_parallel if actor.sequence_parallel else 1
        return math.lcm(self.fp8.row_multiple, 8 * actor.tensor_parallel)

    def transformer_fields(self) -> dict[str, Any]:
        """Its part of megatron-core's TransformerConfig."""
        fields: dict[str, Any] = {"params_dtype": self.dtype, "pipeline_dtype": self.dtype, "bf16": self.bf16}
        if self.fp8 is not None:
            fields |= {
                "fp8": self.fp8.format,
                "fp8_recipe": self.fp8.name,
                "fp8_amax_history_len": 1024,
                "fp8_amax_compute_algo": "max",
                "first_last_layers_bf16": self.fp8.edges > 0,
                "num_layers_at_start_in_bf16": self.fp8.edges,
                "num_layers_at_end_in_bf16": self.fp8.edges,
            }
        return fields

    def optimizer_fields(self) -> dict[str, Any]:
        """Its part of megatron-core's OptimizerConfig; main weights and moments are fp32 by its own defaults."""
        return {
            "params_dtype": self.dtype,
            "bf16": self.bf16,
            "fp8_recipe": None if self.fp8 is None else self.fp8.name,
        }


ADA, HOPPER, BLACKWELL, BLACKWELL_RTX, ANY = (8, 9), (9, 0), (10, 0), (12, 0), (99, 0)
TENSORWISE = Recipe("tensorwise", "hybrid", 16, 16, edges=1, te=(2, 2), cuda=(12, 1), capabilities=(ADA, ANY))
BLOCKWISE = Recipe(
    "blockwise",
    "e4m3",
    row_multiple=128,
    block=128,
    edges=1,
    te=(2, 3),
    cuda=(12, 9),
    capabilities=(HOPPER, BLACKWELL),  # from Blackwell on it is emulated by mxfp8, with other scales
    environment=(("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1"),),  # not rounded to powers of two
    tile=(1, 128),
    weight_tile=(128, 128),
)
DELAYED = Recipe("delayed", "hybrid", 16, 16, edges=0, te=(2, 0), cuda=(12, 1), capabilities=(ADA, ANY), delayed=True)
MXFP8 = Recipe(
    "mxfp8",
    "e4m3",
    row_multiple=32,
    block=32,
    edges=1,
    te=(2, 1),
    cuda=(12, 8),
    capabilities=(BLACKWELL, BLACKWELL_RTX),
    tile=(1, 32),
    weight_tile=(1, 32),
    powers_of_two=True,
)

PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("bf16", "bfloat16"),
        Precision("fp8-tensorwise", "bfloat16", TENSORWISE),
        Precision("fp8-blockwise", "bfloat16", BLOCKWISE),
        Precision("fp8-delayed", "bfloat16", DELAYED),
        Precision("mxfp8", "bfloat16", MXFP8),
        Precision("fp32", "float32"),
    )
}


def precision_of(config: Config) -> Precision:
    """The precision a config asks for."""
    return PRECISIONS[config.actor.precision]


def without_fp8(config: Config) -> Config:
    """The config of a policy that does not train: the same weights, no FP8 products."""
    if precision_of(config).fp8 is None:
        return config
    return replace(config, actor=replace(config.actor, precision="bf16"))
