"""Llama: Meta's Llama 2 and 3, with and without rope scaling, and everything saved as LlamaForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_r3.models.architecture import Architecture, decoder

HF_CLASS = "LlamaForCausalLM"


def architecture(hf: Mapping[str, Any]) -> Architecture:
    """Reads a Llama config.json."""
    return decoder(hf, "llama")
