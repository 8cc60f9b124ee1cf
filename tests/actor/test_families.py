"""Families and layouts that test_policy.py does not try in full: log-probabilities, export and an update."""

from __future__ import annotations

from typing import Any

import pytest
from families import UNTRIED
from safetensors.torch import load_file

CASES = [f"family-{layout}-{kind}" for layout, kind in UNTRIED]


@pytest.mark.parametrize("name", CASES)
def test_scores_and_an_update_equal_transformers(one: Any, every: dict[str, Any], name: str) -> None:
    found, kind = every[name], name.split("-")[2]
    assert found["score"] < 1e-4  # seen: 1.1e-5
    (expected,) = one.found[f"plain-family-{kind}"]
    assert {key: found["update"][key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    ours, theirs = (load_file(one.home / f"{which}-1.weights.safetensors") for which in (name, f"plain-{kind}"))
    assert ours.keys() == theirs.keys()
    assert max((ours[key] - theirs[key]).abs().max().item() for key in theirs) < 1e-5  # seen: 2.1e-6


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_survives_loading_and_export_of_which_stages_hand_on_only_parts(
    every: dict[str, Any], name: str
) -> None:
    facts = every[name]["export"]
    assert facts["same_names"] and facts["bit_exact"] and facts["same_everywhere"]
    assert facts["broadcast"] == (facts["part"] if "pp2" in name else 0)
