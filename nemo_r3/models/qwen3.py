"""Qwen3: Llama's shape with a norm on every query and key head, whose width config.json names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_r3.models.architecture import Architecture, decoder

HF_CLASS = "Qwen3ForCausalLM"


def architecture(hf: Mapping[str, Any]) -> Architecture:
    """Reads a Qwen3 config.json."""
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    return decoder({"head_dim": 128} | dict(hf), "qwen3", qk_norm=True, window=window)
