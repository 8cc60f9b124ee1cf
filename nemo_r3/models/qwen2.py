"""Qwen2 and Qwen2.5: Llama's shape with a bias on the query, key and value projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_r3.errors import ConfigError
from nemo_r3.models.architecture import Architecture, rope_theta

HF_CLASS = "Qwen2ForCausalLM"


def architecture(hf: Mapping[str, Any]) -> Architecture:
    """Reads a Qwen2 config.json.

    Raises:
        ConfigError: the checkpoint uses sliding-window attention.
    """
    if hf.get("use_sliding_window"):
        raise ConfigError(f"model.path: {HF_CLASS} with use_sliding_window=true is not supported")
    return Architecture(
        family="qwen2",
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf["hidden_size"] // hf["num_attention_heads"],
        vocab_size=hf["vocab_size"],
        max_positions=hf["max_position_embeddings"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=rope_theta(hf, 10000.0),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=True,
    )
