"""Llama: Meta's Llama 2 and 3 without rope scaling, and everything saved as LlamaForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_r3.errors import ConfigError
from nemo_r3.models.architecture import Architecture, rope_theta

HF_CLASS = "LlamaForCausalLM"


def architecture(hf: Mapping[str, Any]) -> Architecture:
    """Reads a Llama config.json.

    Raises:
        ConfigError: the checkpoint has biases or another activation than this family's.
    """
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise ConfigError(f"model.path: {HF_CLASS} with {key}=true is not supported")
    if hf.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"model.path: {HF_CLASS} with hidden_act={hf['hidden_act']!r} is not supported (only 'silu')")
    return Architecture(
        family="llama",
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        vocab_size=hf["vocab_size"],
        max_positions=hf["max_position_embeddings"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=rope_theta(hf, 10000.0),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=False,
    )
