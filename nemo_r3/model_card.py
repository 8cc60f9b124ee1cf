"""README.md of an export: what was trained, how, and what it reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from nemo_r3.config import Config, to_yaml
from nemo_r3.report import HEADINGS, NOTE, rates


def model_card(config: Config, summary: Mapping[str, Any], step: int, base: str) -> str:
    """README.md of an export after `step` steps, from the run's config, its summary.json and the starting model's name.

    The summary's results are shown if they were measured at that step.
    """
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nemo_r3", "reflect-retry-reward", "reinforcement-learning", "grpo", config.task.name],
    }
    algo, phases = config.algo, " and ".join(config.algo.trained_phases)
    unless = "" if algo.reward_leaks else ", unless it gives the answer away itself"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {base}, trained to reflect on {config.task.name}",
        "Trained with nemo_r3 by [Reflect, Retry, Reward](https://arxiv.org/abs/2505.24726): after a failed answer the "
        "model writes a reflection and tries again, and the reflection is rewarded when a verifier accepts the "
        f"retry{unless}. "
        f"{step} steps of {algo.loss.upper()} on {phases} tokens, {algo.group_size} reflections per failed answer, "
        f"peak learning rate {config.actor.lr:g}, KL weight {algo.kl_beta:g} to the starting model.",
    ]
    if has_results(summary, step):
        parts += ["## Results", _markdown(summary)]
    parts += ["## Settings", f"```yaml\n{to_yaml(config)}```"]
    if summary.get("versions"):
        lines = [f"- {name} {version}" for name, version in summary["versions"].items()]
        parts += ["## Versions", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def has_results(summary: Mapping[str, Any], step: int) -> bool:
    """Whether a summary holds rates after training, measured at this step and not at another."""
    return "after" in summary and summary.get("step", step) == step


def _markdown(summary: Mapping[str, Any]) -> str:
    """The before/after table for a model card."""
    rows = [HEADINGS, ("---", "---", "---", "---", "---:"), *rates(summary)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"Held-out problems, before → after training.\n\n{table}\n\n{NOTE}"
