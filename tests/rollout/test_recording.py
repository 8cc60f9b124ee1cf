"""The experts that vLLM records are those that it computed with, however it came to a token."""

from __future__ import annotations

import json
from pathlib import Path

from processes import run_script


def test_recorded_experts_are_those_of_transformers_routers(tmp_path: Path) -> None:
    """In float32, so that both choose alike."""
    run_script(Path(__file__).with_name("recorded.py"), tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["dtype"] == "uint8" and found["not wanted"]
    assert (found["new"], found["cached"], found["after the prompt"]) == (0, 0, 0)
    assert (found["cached tokens"]["new0"], found["cached tokens"]["cached0"]) == (0, 96)
    assert found["together"] == [0] * 6 and found["preempted"]
    assert found["stopped"] == [8, 0, 0]
    assert found["refit"] == 0 and found["of other weights"] > 100
    assert found["forgotten"].endswith("the experts of 0 tokens, not of 139")
    assert found["asked of a GPU"] == [False, True]


def test_a_step_that_is_still_under_way_does_not_outlive_its_weights(tmp_path: Path) -> None:
    """On a GPU a request that ends with a stop token leaves one, and vLLM's recorder cannot be reset before it ends."""
    run_script(Path(__file__).with_name("ahead.py"), tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found == {"ended": "stop", "under way": 1, "first": 0, "after a refit": 0}
