"""Experts in a refit: each matrix goes straight to where vLLM keeps it, stacked with those of its layer.

A model has thousands of them. For each one vLLM's own loader takes a tenth of a millisecond of the host or more, and it
holds a layer's until all are there, beside a second copy of the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Stacks:
    """A layer's experts as this rank holds them unquantised, for Triton's kernels or, before it packs them, a CPU's."""

    gate_up: Tensor  # [experts, 2 * columns, hidden]
    down: Tensor  # [experts, hidden, columns]
    rank: int  # which of an expert's columns they are

    def fill(self, expert: int, matrix: str, whole: Tensor) -> None:
        """Copies this rank's part of an expert's whole gate_proj, up_proj or down_proj to its place."""
        columns = self.down.shape[-1]
        own = slice(self.rank * columns, (self.rank + 1) * columns)
        match matrix:
            case "gate_proj":
                self.gate_up[expert, :columns].copy_(whole[own])
            case "up_proj":
                self.gate_up[expert, columns:].copy_(whole[own])
            case "down_proj":
                self.down[expert].copy_(whole[:, own])
            case _:
                raise ValueError(f"an expert has no {matrix}")


def filling(stacks: Mapping[str, Stacks], weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights without the experts', which it copies into the stacks as they pass.

    Args:
        stacks: of this rank's layers, by what comes before ".experts." in a matrix's name.
        weights: Hugging Face names and full tensors.
    """
    for name, tensor in weights:
        layer, _, which = name.partition(".experts.")
        if which:
            expert, matrix, _ = which.split(".")
            stacks[layer].fill(int(expert), matrix, tensor)
        else:
            yield name, tensor
