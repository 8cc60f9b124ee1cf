"""Whether machine and model can do the FP8 that a run asks for: refused by name before any weight is read.

    actor.precision, rollout.quantization -> GPU, CUDA, Transformer Engine, megatron-core, the matrices' dimensions

Without Transformer Engine, megatron-core would accept an FP8 config and silently run BF16.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from nemo_r3.config import Config
from nemo_r3.errors import ConfigError, in_one_line
from nemo_r3.models import Architecture
from nemo_r3.precision import ADA, HOPPER, PRECISIONS, Recipe, Version, precision_of

MEGATRON = (0, 19)
"""The oldest megatron-core whose FP8 we know."""
VLLM = {"fp8_per_tensor": (ADA, 16), "fp8_per_block": (HOPPER, 128)}
"""vLLM's online FP8: the first compute capability that has it, and what the dimensions it sums over divide by."""


@dataclass(frozen=True)
class Machine:
    """The software and hardware that decide which arithmetic can run."""

    megatron: Version  # megatron-core's
    te: Version | None = None  # Transformer Engine's; None if it cannot be imported
    cuda: Version | None = None  # the one that torch was built for; None without a GPU
    capability: Version | None = None  # the GPU's CUDA compute capability, (9, 0) for an H100; None without a GPU
    te_error: str = ""  # why Transformer Engine cannot be imported

    @classmethod
    def here(cls) -> Machine:
        """The one that this process runs on; imports Transformer Engine if there is a GPU."""
        import torch  # plans do without

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
        return None, in_one_line(error)
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
        _check_machine(f"actor.precision={precision.name}", precision.fp8, machine)
    if config.rollout.quantization != "none":
        _check_rollout_machine(config, machine)
    check_dimensions(config, arch)


def check_dimensions(config: Config, arch: Architecture) -> None:
    """Refuses an arithmetic that the model's dimensions on a rank cannot do, on whatever machine; needs no torch.

    Raises:
        ConfigError: the setting, the dimension and what it must be a multiple of.
    """
    precision, quantization = precision_of(config), config.rollout.quantization
    if precision.fp8 is not None:
        asked = f"actor.precision={precision.name}"
        for dimension in matrix_dimensions(arch, config.actor.tensor_parallel):
            _check_dimension(asked, "actor", dimension, precision.fp8.block)
        if arch.num_layers <= 2 * precision.fp8.edges:
            raise ConfigError(
                f"{asked} leaves the first and the last layer in BF16, and the model has {arch.num_layers} layers: "
                "nothing would be FP8; ask for bf16"
            )
    if quantization != "none":
        for dimension in matrix_dimensions(arch, config.rollout.tensor_parallel):
            if dimension.summed:
                _check_dimension(f"rollout.quantization={quantization}", "rollout", dimension, VLLM[quantization][1])


def _check_machine(asked: str, recipe: Recipe, machine: Machine) -> None:
    if machine.capability is None or machine.cuda is None:
        raise ConfigError(f"{asked} needs an NVIDIA GPU, and torch finds none here; ask for bf16 or fp32")
    if machine.te is None:
        raise ConfigError(
            f"{asked} needs Transformer Engine, which cannot be imported ({machine.te_error}); "
            "install transformer-engine[pytorch]: without it megatron-core would run BF16 and not say so"
        )
    here, (first, last) = machine.capability, recipe.capabilities
    if not recipe.runs_on(here):
        kind, limit = ("of", f"{_show(first)} or above") if here < first else ("below", _show(last))
        others = [name for name, other in PRECISIONS.items() if other.fp8 and other.fp8.runs_on(here)]
        raise ConfigError(
            f"{asked} needs a GPU {kind} CUDA compute capability {limit}; this one has {_show(here)} "
            + (f"(it has {', '.join(others)})" if others else "(ask for bf16)")
        )
    for name, found, oldest in (
        ("CUDA", machine.cuda, recipe.cuda),
        ("Transformer Engine", machine.te, recipe.te),
        ("megatron-core", machine.megatron, MEGATRON),
    ):
        if found < oldest:
            raise ConfigError(f"{asked} needs {name} {_show(oldest)} or newer, found {_show(found)}")


def _check_rollout_machine(config: Config, machine: Machine) -> None:
    asked, (first, _) = f"rollout.quantization={config.rollout.quantization}", VLLM[config.rollout.quantization]
    if machine.capability is None:
        raise ConfigError(f"{asked} needs an NVIDIA GPU, and torch finds none here; ask for none")
    if machine.capability < first:
        raise ConfigError(
            f"{asked} needs a GPU of CUDA compute capability {_show(first)} or above; this one has "
            f"{_show(machine.capability)}, where vLLM would multiply in BF16"
        )


def _show(version: Version) -> str:
    return ".".join(map(str, version))


@dataclass(frozen=True)
class Dimension:
    """A dimension of a layer's matrices."""

    what: str  # its name
    total: int  # its size in the whole model
    ways: int  # tensor-parallel ranks that it is cut over
    summed: bool = True  # whether a product sums over it, so that numbers are quantised along it


def matrix_dimensions(arch: Architecture, ways: int) -> Iterator[Dimension]:
    """Every dimension of the four matrices of a layer.

    Gate and up are one matrix of twice the feed-forward columns, which divides if those do.
    """
    yield Dimension("hidden size", arch.hidden_size, 1)
    yield Dimension("query, key and value columns", arch.query_width + 2 * arch.key_width, ways, summed=False)
    yield Dimension("attention columns", arch.query_width, ways)
    yield Dimension("feed-forward columns", arch.ffn_hidden_size, ways)


def _check_dimension(asked: str, section: str, dimension: Dimension, block: int) -> None:
    size = dimension.total // dimension.ways
    if size % block:
        cut = f" ({dimension.total} / {section}.tensor_parallel={dimension.ways})" if dimension.ways > 1 else ""
        raise ConfigError(
            f"{asked} needs multiples of {block}, and the model's {dimension.what} on a rank are {size}{cut}"
        )


def advice(config: Config) -> str | None:
    """A hint about a legal but unwise setting, or None."""
    quantization, correction = config.rollout.quantization, config.algo.mismatch_correction
    if quantization == "none" or correction != "none":
        return None
    return (
        f"rollout.quantization={quantization} samples from other numbers than the actor trains; "
        "algo.mismatch_correction=tis weighs the tokens accordingly"
    )
