"""The card of an export says what was trained, how, and what it reached."""

from __future__ import annotations

import yaml

from nemo_r3.config import Config
from nemo_r3.model_card import model_card


def test_model_card() -> None:
    rate = {"value": 0.5, "low": 0.45, "high": 0.55, "n": 400}
    modes = {"sampled": rate, "greedy": rate}
    scores = {"first_try": modes, "retry_success_fixed": modes, "within_two": modes}
    summary = {
        "before": scores,
        "after": scores,
        "difference": {"first_try": modes},
        "step": 40,
        "versions": {"torch": "2.13.0"},
    }
    config = Config()
    config.model.path = "models/tiny"
    card = model_card(config, summary, 40, "tiny")
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "license" not in front
    assert "# tiny, trained to reflect on countdown" in text
    assert "40 steps of GRPO on reflection tokens" in text
    assert "the reflection is rewarded when a verifier accepts the retry. 40 steps" in text
    assert "| first try | 0.50 [0.45, 0.55] → 0.50 [0.45, 0.55] | +0.50 ±0.05 | 0.50 → 0.50 | 400 |" in text
    assert "- torch 2.13.0" in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["model"]["path"] == "models/tiny"
    assert "Results" not in model_card(config, summary, 80, "tiny"), "measured at another step"
    assert "Results" not in model_card(config, {}, 80, "tiny")
    config.algo.reward_leaks = False
    assert "accepts the retry, unless it gives the answer away itself. 40" in model_card(config, summary, 40, "tiny")
