"""Where a refit puts experts; that vLLM then computes with them is in tests/refit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_r3.rollout.experts import Stacks, filling

EXPERTS, COLUMNS, HIDDEN = 3, 8, 4
SHAPES = {"gate_proj": (COLUMNS, HIDDEN), "up_proj": (COLUMNS, HIDDEN), "down_proj": (HIDDEN, COLUMNS)}


def empty(rank: int, ranks: int) -> Stacks:
    columns = COLUMNS // ranks
    shapes = (EXPERTS, 2 * columns, HIDDEN), (EXPERTS, HIDDEN, columns)
    return Stacks(*(torch.full(shape, torch.nan) for shape in shapes), rank)


def passed_on(held: dict[str, Stacks], whole: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(filling(held, whole.items()))


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_rank_takes_its_columns_of_every_expert_and_hands_all_else_on(ranks: int) -> None:
    whole = {
        f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight": torch.randn(shape)
        for layer in (0, 11)
        for expert in range(EXPERTS)
        for matrix, shape in SHAPES.items()
    }
    others = {"model.layers.0.mlp.gate.weight": torch.randn(EXPERTS, HIDDEN), "lm_head.weight": torch.randn(5, HIDDEN)}
    held = [{f"model.layers.{layer}.mlp": empty(rank, ranks) for layer in (0, 11)} for rank in range(ranks)]
    for mine in held:
        assert passed_on(mine, whole | others).keys() == others.keys()
    for name, tensor in whole.items():
        layer, _, which = name.partition(".experts.")
        expert, matrix, _ = which.split(".")
        parts = [mine[layer] for mine in held]
        gate_up, down = (
            torch.stack([getattr(part, each)[int(expert)] for part in parts]) for each in ("gate_up", "down")
        )
        gate, up = gate_up.chunk(2, dim=1)
        found: Any = {
            "gate_proj": gate.flatten(0, 1),
            "up_proj": up.flatten(0, 1),
            "down_proj": torch.cat([*down], dim=1),
        }
        assert found[matrix].equal(tensor), name


def test_a_matrix_of_another_name_is_no_experts() -> None:
    with pytest.raises(ValueError, match="bias_proj"):
        passed_on({"model.layers.0.mlp": empty(0, 1)}, {"model.layers.0.mlp.experts.0.bias_proj.weight": torch.ones(1)})
