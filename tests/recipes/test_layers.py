"""Which layers are taken out of FP8."""

from __future__ import annotations

import math
from typing import Any

from recipes.layers import costliest


def rows(errors: dict[int, float], operand: str = "input", fp8: bool = True) -> list[dict[str, Any]]:
    return [
        {"layer": layer, "matrix": matrix, "operand": operand, "fp8": fp8, "error": error}
        for layer, error in errors.items()
        for matrix in ("mlp.linear_fc1", "mlp.linear_fc2")
    ]


def test_a_quarter_of_the_layers_that_are_left_and_at_least_one() -> None:
    errors = {layer: 0.02 + 0.001 * (layer % 5) for layer in range(9)}
    assert list(costliest(rows(errors))) == [4, 3, 8]
    assert costliest(rows({7: 0.03})) == {7: 0.03}
    assert costliest(rows({7: 0.03}, fp8=False)) == {}


def test_input_and_weight_count_together_gradients_do_not_and_nan_is_the_worst() -> None:
    found = rows({1: 0.03, 2: 0.04}) + rows({1: 0.04, 2: 0.001}, "weight") + rows({2: 0.9}, "gradient")
    assert costliest(found) == {1: math.hypot(0.03, 0.04)}
    assert costliest([*found, *rows({2: math.nan})]) == {2: math.inf}
