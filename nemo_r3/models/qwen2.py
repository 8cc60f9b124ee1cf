"""Qwen2 and Qwen2.5: Llama's shape with a bias on the query, key and value projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_r3.errors import ConfigError
from nemo_r3.models.architecture import Architecture, decoder

HF_CLASS = "Qwen2ForCausalLM"


def architecture(hf: Mapping[str, Any]) -> Architecture:
    """Reads a Qwen2 config.json.

    Raises:
        ConfigError: the checkpoint attends in chunks (Qwen2.5's one-million-token models), which vLLM would do.
    """
    if hf.get("dual_chunk_attention_config"):
        raise ConfigError(f"{HF_CLASS} with dual_chunk_attention_config is not supported")
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    return decoder(hf, "qwen2", qkv_bias=True, window=window)
