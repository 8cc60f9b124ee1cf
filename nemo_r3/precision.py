"""`Precision`: the arithmetic of a run, for both the actor and the rollout.

    actor.precision -> Precision -> fields of megatron-core's configs, length of packed rows, environment, vLLM's dtype
                           `-> Recipe (FP8): how Transformer Engine scales, and what that needs of machine and model

With FP8, the matrices of the layers are multiplied in FP8. Embedding, norms, attention, head and sums of gradients are
not; neither are the first and last layer, if the recipe can leave them out. The weights stay BF16, because refit,
export, reference and checkpoints read them: they must not get what was rounded for one recipe's scales.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_r3.config import ActorConfig, Config
from nemo_r3.errors import ConfigError
from nemo_r3.models import Architecture

Version = tuple[int, ...]
Tile = tuple[int, int]
"""Rows and columns of a matrix that share a scale."""


@dataclass(frozen=True)
class Recipe:
    """One of Transformer Engine's ways to scale numbers into FP8.

    Attributes:
        name: megatron-core's name.
        format: "e4m3", or "hybrid" with gradients in e5m2, whose range is larger.
        row_multiple: the length of a packed row, in tokens, must be a multiple of this.
        block: every dimension of a layer's matrices on a rank must be a multiple of this.
        edges: layers at each end of the model that stay BF16; 0 if the recipe cannot leave any out.
        te: the oldest Transformer Engine that has it.
        cuda: the oldest CUDA.
        capabilities: supported range [first, last) of CUDA compute capabilities.
        environment: variables that must be set when Transformer Engine is imported.
        tile: what shares a scale in inputs and gradients; None for the whole tensor.
        weight_tile: the same in weights.
        powers_of_two: whether scales are rounded to powers of two.
        delayed: whether scales come from earlier steps' amax, and so can be wrong for the current one.
    """

    name: str
    format: str
    row_multiple: int
    block: int
    edges: int
    te: Version
    cuda: Version
    capabilities: tuple[Version, Version]
    environment: tuple[tuple[str, str], ...] = ()
    tile: Tile | None = None
    weight_tile: Tile | None = None
    powers_of_two: bool = False
    delayed: bool = False


@dataclass(frozen=True)
class Precision:
    """What one name of `actor.precision` stands for.

    Attributes:
        name: the setting.
        dtype: of the actor's parameters and activations; main weights, gradients and moments stay fp32.
        vllm_dtype: vLLM's name for the rollout's dtype.
        fp8: how the layers' matrices are multiplied in FP8; None if they are not.
    """

    name: str
    dtype: torch.dtype
    vllm_dtype: str
    fp8: Recipe | None = None

    @property
    def bf16(self) -> bool:
        """Whether megatron-core must keep fp32 main weights beside bf16 ones."""
        return self.dtype is torch.bfloat16

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
                "fp8_param": False,
                "fp8_amax_history_len": 1024,
                "fp8_amax_compute_algo": "max",
                "fp8_dot_product_attention": False,
                "fp8_multi_head_attention": False,
                "first_last_layers_bf16": self.fp8.edges > 0,
                "num_layers_at_start_in_bf16": self.fp8.edges,
                "num_layers_at_end_in_bf16": self.fp8.edges,
            }
        return fields

    def gradient_fields(self) -> dict[str, Any]:
        """Its part of megatron-core's DistributedDataParallelConfig: sums in fp32, parameters gathered in BF16."""
        return {"grad_reduce_in_fp32": True, "fp8_param_gather": False}

    def optimizer_fields(self) -> dict[str, Any]:
        """Its part of megatron-core's OptimizerConfig; main weights and moments are fp32 by its own defaults."""
        return {
            "params_dtype": self.dtype,
            "bf16": self.bf16,
            "fp8_recipe": None if self.fp8 is None else self.fp8.name,
        }


MEGATRON = (0, 19)
"""The oldest megatron-core whose FP8 we know."""
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
        Precision("bf16", torch.bfloat16, "bfloat16"),
        Precision("fp8-tensorwise", torch.bfloat16, "bfloat16", TENSORWISE),
        Precision("fp8-blockwise", torch.bfloat16, "bfloat16", BLOCKWISE),
        Precision("fp8-delayed", torch.bfloat16, "bfloat16", DELAYED),
        Precision("mxfp8", torch.bfloat16, "bfloat16", MXFP8),
        Precision("fp32", torch.float32, "float32"),
    )
}

VLLM = {"fp8_per_tensor": (ADA, 16), "fp8_per_block": (HOPPER, 128)}
"""vLLM's online FP8: the first compute capability that has it, and what the dimensions it sums over divide by."""


def precision_of(config: Config) -> Precision:
    """The precision a config asks for."""
    return PRECISIONS[config.actor.precision]


def without_fp8(config: Config) -> Config:
    """The config of a policy that does not train: the same weights, no FP8 products."""
    if precision_of(config).fp8 is None:
        return config
    return replace(config, actor=replace(config.actor, precision="bf16"))


@dataclass(frozen=True)
class Machine:
    """The software and hardware that decide which arithmetic can run.

    Attributes:
        megatron: megatron-core's version.
        te: Transformer Engine's version; None if it cannot be imported.
        cuda: the version of CUDA that torch was built for; None without a GPU.
        capability: the GPU's CUDA compute capability, (9, 0) for an H100; None without a GPU.
        te_error: why Transformer Engine cannot be imported.
    """

    megatron: Version
    te: Version | None = None
    cuda: Version | None = None
    capability: Version | None = None
    te_error: str = ""

    @classmethod
    def here(cls) -> Machine:
        """The one that this process runs on; imports Transformer Engine if there is a GPU."""
        megatron = _version(importlib.metadata.version("megatron-core"))
        if not torch.cuda.is_available():
            return cls(megatron)
        te, error = _transformer_engine()
        return cls(megatron, te, _version(torch.version.cuda or "0"), torch.cuda.get_device_capability(), error)


def _version(text: str) -> Version:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def _transformer_engine() -> tuple[Version | None, str]:
    try:
        import transformer_engine.pytorch
    except (ImportError, OSError) as error:  # not installed, or one of its libraries is missing
        return None, " ".join(str(error).split())
    return _version(transformer_engine.__version__), ""


def prepare(config: Config, arch: Architecture) -> None:
    """Sets the environment that Transformer Engine reads when it is imported, then refuses what cannot run here.

    Variables that a user has set stay. Every rank calls this after its GPU is chosen and before the actor is imported.

    Raises:
        ConfigError: see `check`.
        RuntimeError: Transformer Engine was imported before its environment was ready.
    """
    recipe = precision_of(config).fp8
    for name, value in recipe.environment if recipe is not None else ():
        if name not in os.environ and "transformer_engine" in sys.modules:
            raise RuntimeError(f"{name} must be set before transformer_engine is imported")
        os.environ.setdefault(name, value)
    check(config, arch, Machine.here())


def check(config: Config, arch: Architecture, machine: Machine) -> None:
    """Refuses an arithmetic that the machine or the model's dimensions cannot do, before any weight is read.

    Raises:
        ConfigError: the setting, what forbids it, and what would work.
    """
    precision = precision_of(config)
    if precision.fp8 is not None:
        asked = f"actor.precision={precision.name}"
        _check_machine(asked, precision.fp8, machine)
        for dimension in matrix_dimensions(arch, config.actor.tensor_parallel):
            _check_dimension(asked, "actor", dimension, precision.fp8.block)
        if arch.num_layers <= 2 * precision.fp8.edges:
            raise ConfigError(
                f"{asked} leaves the first and the last layer in BF16, and the model has {arch.num_layers} layers: "
                "nothing would be FP8; ask for bf16"
            )
    if config.rollout.quantization != "none":
        _check_rollout(config, arch, machine)


def _check_machine(asked: str, recipe: Recipe, machine: Machine) -> None:
    if machine.capability is None or machine.cuda is None:
        raise ConfigError(f"{asked} needs an NVIDIA GPU, and torch finds none here; ask for bf16 or fp32")
    if machine.te is None:
        raise ConfigError(
            f"{asked} needs Transformer Engine, which cannot be imported ({machine.te_error}); "
            "install transformer-engine[pytorch]: without it megatron-core would run BF16 and not say so"
        )
    first, last = recipe.capabilities
    if machine.capability < first:
        raise ConfigError(
            f"{asked} needs a GPU of CUDA compute capability {_show(first)} or above; this one has "
            f"{_show(machine.capability)}{_other(machine.capability)}"
        )
    if machine.capability >= last:
        raise ConfigError(
            f"{asked} needs a GPU below CUDA compute capability {_show(last)}; this one has "
            f"{_show(machine.capability)}{_other(machine.capability)}"
        )
    for name, found, oldest in (
        ("CUDA", machine.cuda, recipe.cuda),
        ("Transformer Engine", machine.te, recipe.te),
        ("megatron-core", machine.megatron, MEGATRON),
    ):
        if found < oldest:
            raise ConfigError(f"{asked} needs {name} {_show(oldest)} or newer, found {_show(found)}")


def _other(capability: Version) -> str:
    """The FP8 precisions that a GPU does have, for an error message."""
    names = [
        name
        for name, precision in PRECISIONS.items()
        if precision.fp8 is not None and precision.fp8.capabilities[0] <= capability < precision.fp8.capabilities[1]
    ]
    return f" (it has {', '.join(names)})" if names else " (ask for bf16)"


def _show(version: Version) -> str:
    return ".".join(map(str, version))


@dataclass(frozen=True)
class Dimension:
    """A dimension of a layer's matrices.

    Attributes:
        what: its name.
        total: its size in the whole model.
        ways: tensor-parallel ranks that it is cut over.
        summed: whether a product sums over it, so that numbers are quantised along it.
    """

    what: str
    total: int
    ways: int
    summed: bool = True


def matrix_dimensions(arch: Architecture, ways: int) -> Iterator[Dimension]:
    """Every dimension of the four matrices of a layer.

    Gate and up are one matrix of twice the feed-forward columns, which divides if those do.
    """
    queries, keys = arch.num_heads * arch.head_dim, 2 * arch.num_kv_heads * arch.head_dim
    yield Dimension("hidden size", arch.hidden_size, 1)
    yield Dimension("query, key and value columns", queries + keys, ways, summed=False)
    yield Dimension("attention columns", queries, ways)
    yield Dimension("feed-forward columns", arch.ffn_hidden_size, ways)


def _check_dimension(asked: str, section: str, dimension: Dimension, block: int) -> None:
    size = dimension.total // dimension.ways
    if size % block:
        cut = f" ({dimension.total} / {section}.tensor_parallel={dimension.ways})" if dimension.ways > 1 else ""
        raise ConfigError(
            f"{asked} needs multiples of {block}, and the model's {dimension.what} on a rank are {size}{cut}"
        )


def _check_rollout(config: Config, arch: Architecture, machine: Machine) -> None:
    asked, (first, block) = f"rollout.quantization={config.rollout.quantization}", VLLM[config.rollout.quantization]
    if machine.capability is None:
        raise ConfigError(f"{asked} needs an NVIDIA GPU, and torch finds none here; ask for none")
    if machine.capability < first:
        raise ConfigError(
            f"{asked} needs a GPU of CUDA compute capability {_show(first)} or above; this one has "
            f"{_show(machine.capability)}, where vLLM would multiply in BF16"
        )
    for dimension in matrix_dimensions(arch, config.rollout.tensor_parallel):
        if dimension.summed:
            _check_dimension(asked, "rollout", dimension, block)


def advice(config: Config) -> str | None:
    """A hint about a legal but unwise setting, or None."""
    quantization, correction = config.rollout.quantization, config.algo.mismatch_correction
    if quantization == "none" or correction != "none":
        return None
    return (
        f"rollout.quantization={quantization} samples from other numbers than the actor trains; "
        "algo.mismatch_correction=tis weighs the tokens accordingly"
    )
