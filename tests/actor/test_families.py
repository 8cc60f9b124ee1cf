"""Every family that counts as supported, tied and untied: log-probabilities, export and an update at three layouts."""

from __future__ import annotations

from typing import Any

import pytest
from families import KINDS, LAYOUTS
from safetensors.torch import load_file

CASES = [f"family-{layout}-{kind}" for layout in LAYOUTS for kind in KINDS]


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_transformers(every: dict[str, Any], name: str) -> None:
    assert every[name]["score"] < 1e-4  # seen: 1.1e-5


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_survives_loading_and_export_bit_for_bit(every: dict[str, Any], name: str) -> None:
    facts = every[name]["export"]
    assert facts["same_names"] and facts["bit_exact"] and facts["same_everywhere"]


@pytest.mark.parametrize("name", CASES)
def test_an_export_hands_only_parts_to_other_stages(every: dict[str, Any], name: str) -> None:
    facts = every[name]["export"]
    assert facts["broadcast"] == (facts["part"] if "pp2" in name else 0)


@pytest.mark.parametrize("name", CASES)
def test_an_update_equals_a_plain_loop_on_transformers(one: Any, every: dict[str, Any], name: str) -> None:
    kind = name.split("-")[2]
    (expected,) = one.found[f"plain-family-{kind}"]
    assert {key: every[name]["update"][key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    ours, theirs = (load_file(one.home / f"{which}-1.weights.safetensors") for which in (name, f"plain-{kind}"))
    assert ours.keys() == theirs.keys()
    assert max((ours[key] - theirs[key]).abs().max().item() for key in theirs) < 1e-5  # seen: 2.1e-6
