"""Phi-3, Phi-3.5 and Phi-4: Llama's shape in fused tensors, with longrope and a share of each head that turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_r3.models.architecture import Architecture, decoder

HF_CLASS = "Phi3ForCausalLM"


def architecture(hf: Mapping[str, Any]) -> Architecture:
    """Reads a Phi-3 config.json."""
    hf = {"rms_norm_eps": 1e-5} | dict(hf)
    return decoder(hf, "phi3", partial_rotary=True, fused=True, window=hf.get("sliding_window"))
