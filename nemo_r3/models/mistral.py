"""Mistral: Llama's shape, in its first version with a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_r3.models.architecture import Architecture, decoder

HF_CLASS = "MistralForCausalLM"


def architecture(hf: Mapping[str, Any]) -> Architecture:
    """Reads a Mistral config.json."""
    return decoder(hf, "mistral", window=hf.get("sliding_window", 4096))
