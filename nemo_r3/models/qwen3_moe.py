"""Qwen3 with experts: Qwen3 with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_r3.errors import ConfigError
from nemo_r3.models.architecture import Architecture, Experts, decoder, flag
from nemo_r3.models.rope import positive_integer

HF_CLASS = "Qwen3MoeForCausalLM"


def architecture(hf: Mapping[str, Any]) -> Architecture:
    """Reads a Qwen3-MoE config.json.

    Raises:
        ConfigError: some layers are dense, or the router could not learn.
    """
    everywhere: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}
    for key, value in everywhere.items():
        if (found := hf.get(key, value)) != value:
            raise ConfigError(
                f"{HF_CLASS} with {key}={found!r} is not supported: only {value!r}, experts in every layer"
            )
    count = positive_integer(hf, "num_experts" if "num_experts" in hf else "num_local_experts")
    experts = Experts(count, positive_integer(hf, "num_experts_per_tok", count), flag(hf, "norm_topk_prob"))
    if experts.normalized and experts.per_token == 1:
        raise ConfigError(
            "num_experts_per_tok=1 with norm_topk_prob=true weighs every expert by 1: no router can learn"
        )
    expert = dict(hf) | {"intermediate_size": positive_integer(hf, "moe_intermediate_size")}
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    return decoder(expert, "qwen3_moe", qk_norm=True, window=window, experts=experts)
