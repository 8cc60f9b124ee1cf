"""The card of an export: what was trained, how, what it reached, and how an adapter is served."""

from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from nemo_r3.config import Config
from nemo_r3.model_card import how_to_use_adapter, model_card


def test_model_card() -> None:
    rate = {"value": 0.5, "low": 0.45, "high": 0.55, "n": 400}
    modes = {"sampled": rate, "greedy": rate}
    scores = {"first_try": modes, "retry_success_fixed": modes, "within_two": modes}
    summary = {"before": scores, "after": scores, "difference": {"first_try": modes}}
    summary |= {"step": 40, "versions": {"torch": "2.13.0"}}
    config = Config()
    config.model.path = "models/tiny"
    config.cluster.setup = "export HF_TOKEN=hf_secret"
    card = model_card(config, summary, 40, "tiny", "serve it")
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "license" not in front and "base_model" not in yaml.safe_load(front)
    assert "# tiny, trained to reflect on countdown" in text
    assert "40 steps of GRPO on reflection tokens" in text and "failed answer, peak learning rate" in text
    assert "the reflection is rewarded when a verifier accepts the retry. 40 steps" in text
    assert "| first try | 0.50 [0.45, 0.55] → 0.50 [0.45, 0.55] | +0.50 ±0.05 | 0.50 → 0.50 | 400 |" in text
    assert "- torch 2.13.0" in text
    assert "## How to use\n\nserve it\n\n" in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["model"]["path"] == "models/tiny" and "hf_secret" not in card
    assert "Results" not in model_card(config, summary, 80, "tiny", "serve it"), "measured at another step"
    assert "Results" not in model_card(config, {}, 80, "tiny", "serve it")
    of_the_hub = model_card(config, {}, 80, "org/tiny", "serve it")
    assert yaml.safe_load(of_the_hub.split("---\n")[1])["base_model"] == "org/tiny"
    config.algo.reward_leaks, config.train.start_from = False, "runs/first/checkpoints/step_000500"
    config.actor.lora_rank = 16
    card = model_card(config, summary, 40, "tiny", "serve it")
    assert "accepts the retry, unless it gives the answer away itself. From a checkpoint of another run" in card
    assert "failed answer, LoRA of rank 16, merged into these weights, peak learning rate" in card
    adapter = model_card(config, summary, 40, "org/tiny", "serve it", adapter=True)
    front = yaml.safe_load(adapter.split("---\n")[1])
    assert (front["library_name"], front["base_model"]) == ("peft", "org/tiny")
    assert "LoRA of rank 16, in this adapter, peak learning rate" in adapter
    assert "see `train.start_from`: 40 steps" in card and "start_from: runs/first/checkpoints/step_000500\n" in card


@pytest.mark.parametrize(("rank", "most"), [(1, 1), (4, 8), (16, 16), (48, 64), (600, 600)])
def test_an_adapter_is_served_with_its_model_at_a_rank_that_vllm_takes(rank: int, most: int) -> None:
    wording = SimpleNamespace(task="solve {task}", reflect="reflect", retry="retry")
    dialogue: Any = SimpleNamespace(wording=wording, tools="template", end_of_turn=(7,), template_options={})
    config = Config()
    text = how_to_use_adapter(config, dialogue, False, "/my models/tiny", rank)
    command = f"vllm serve '/my models/tiny' --enable-lora --max-lora-rank {most} --lora-modules trained=."
    assert f"{command} --dtype bfloat16 --max-model-len" in text
    assert 'AutoPeftModelForCausalLM.from_pretrained(".")' in text
    config.dialogue.chat_template = "own.jinja"
    assert f"{command} --chat-template chat_template.jinja --dtype" in how_to_use_adapter(
        config, dialogue, False, "/my models/tiny", rank
    )
