"""A transformer layer, as far as what watches or replaces its matrices can tell."""

from __future__ import annotations

from torch import Tensor, nn

from nemo_r3.actor.numerics import MATRICES


class Layer(nn.Module):
    """The four matrices of a layer, one after the other."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_number = number
        self.self_attention, self.mlp = nn.Module(), nn.Module()
        for name in MATRICES:
            part, matrix = name.split(".")
            self.get_submodule(part).add_module(matrix, nn.Linear(8, 8, bias=False))

    def forward(self, inputs: Tensor) -> Tensor:
        for name in MATRICES:
            inputs = self.get_submodule(name)(inputs)
        return inputs
