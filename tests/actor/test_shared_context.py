"""A group's context laid once against a row per reflection: the same update at every layout, in fp32."""

from __future__ import annotations

from typing import Any

import pytest

SHARED = [
    "shared-one-llama_tied",
    "shared-one-qwen2-selective",
    "shared-one-qwen2-full",
    "shared-tp2-qwen2",
    "shared-pp2-llama_tied",
    "shared-tp2pp2-llama_tied",
]
CASES = ["one reflection", "two", "sixteen", "several groups in a row", "longer than the budget", "a short context"]


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_a_row_per_reflection(every: dict[str, Any], name: str, case: str) -> None:
    found = every[name][case]
    assert abs(found["loss"]) > 0.05 and found["kl"] > 1e-3 and found["least_gradient"] > 0.01
    assert found["loss_gap"] < 1e-6  # seen: 8e-8
    assert found["gradient_gap"] < 1e-5  # seen: 1.7e-6, of the tensor that differs most


def test_fewer_tokens_do_it(one: Any) -> None:
    found = one.found["shared-one-llama_tied"]
    assert found["sixteen"]["tokens"] == [50 + sum(3 * number % 11 for number in range(16))]
    assert sum(found["sixteen"]["separate_tokens"]) == found["sixteen"]["tokens"][0] + 15 * 50
    assert len(found["several groups in a row"]["tokens"]) == 1


def test_a_pipeline_gets_more_microbatches(every: dict[str, Any]) -> None:
    """Their gradients are in `test_loss_and_gradients_are_those_of_a_row_per_reflection`."""
    for layout in ("pp2", "tp2pp2"):
        found = every[f"shared-{layout}-llama_tied"]
        assert len(found["several groups in a row"]["tokens"]) == 4, "a microbatch per group"
        assert len(found["a short context"]["tokens"]) > 1, "the group is cut"
        assert len(found["sixteen"]["tokens"]) == 1, "its context is too long for that"


def test_a_group_beyond_the_budget_is_cut_into_rows_that_repeat_the_context(one: Any) -> None:
    found = one.found["shared-one-llama_tied"]["longer than the budget"]
    assert len(found["tokens"]) == 3 and max(found["tokens"]) <= 160
    assert sum(found["tokens"]) == 3 * 80 + sum([30, 40, 25, 38, 44]) - 5


def test_no_tensor_of_all_trained_positions_and_the_vocabulary(ceiling: Any) -> None:
    """An update with 150,000 tokens in its vocabulary fits in less memory than its logits would take."""
    found = ceiling.found["ceiling"]
    assert found["chunked"] > 0
    assert "can't allocate memory" in found["at_once"], "the limit would not have been noticed"
