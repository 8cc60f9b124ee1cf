"""Tokens that are sent to given experts: against transformers whose routers are forced, and against one process."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.torch import load_file

SPLIT = ["tp2-none", "pp2-full", "ep2-none", "ep2-4", "pp2ep2", "tp2ep2"]
COMPARED = ("loss", "kl", "grad_norm", "clipped")


def weight_gap(one: Any, name: str, other: str) -> float:
    ours, theirs = (load_file(one.home / f"{which}-4.weights.safetensors") for which in (name, other))
    return max((ours[key] - theirs[key]).abs().max().item() for key in theirs)


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    return {key: metrics[key] for key in COMPARED}


def test_the_experts_that_are_given_compute_and_learn(one: Any) -> None:
    """Two steps of two updates: the reference and the old policy count, too. The reference does its own routing."""
    for found, expected in zip(one.found["routed-one"]["metrics"], one.found["plain-routed"], strict=True):
        assert numbers(found) == pytest.approx(expected, rel=3e-5, abs=1e-6)  # seen: 1.2e-6
    assert weight_gap(one, "routed-one", "plain-qwen3_moe") < 1e-5


def test_its_own_choice_changes_nothing(one: Any) -> None:
    found = one.found["routed-one"]
    assert found["natural"].pop("routing_mismatch") == 0
    assert found["natural"] == pytest.approx(found["free"], rel=1e-6)
    assert min(step["routing_mismatch"] for step in found["metrics"]) > 0.9, "by chance 27 of 28 pairs differ"


@pytest.mark.parametrize("variant", ["selective", "full"])
def test_what_is_computed_again_goes_to_the_same_experts(one: Any, variant: str) -> None:
    for found, expected in zip(
        one.found[f"routed-one-{variant}"]["metrics"], one.found["routed-one"]["metrics"], strict=True
    ):
        assert numbers(found) == numbers(expected)
    assert weight_gap(one, f"routed-one-{variant}", "routed-one") == 0


def test_a_context_that_is_laid_once_goes_where_its_copies_would(one: Any) -> None:
    assert weight_gap(one, "routed-one-False", "routed-one") < 1e-5


@pytest.mark.parametrize("name", SPLIT)
def test_updates_equal_one_process(one: Any, every: dict[str, Any], name: str) -> None:
    alone = "routed-one-4" if name.endswith("-4") else "routed-one"
    for found, expected in zip(every[f"routed-{name}"]["metrics"], one.found[alone]["metrics"], strict=True):
        assert numbers(found) == pytest.approx(numbers(expected), rel=3e-5, abs=1e-6)
        # data-parallel ranks may each lay a group's context, and what is computed again counts again
        assert found["routing_mismatch"] == pytest.approx(expected["routing_mismatch"], abs=0.01)
    assert every[f"routed-{name}"]["same_everywhere"]
    assert weight_gap(one, f"routed-{name}", alone) < 1e-5
