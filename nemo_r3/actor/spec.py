"""The layer spec: which modules a transformer layer is made of, with Transformer Engine and without."""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from nemo_r3.actor.attention import SharedContextAttention
from nemo_r3.errors import ConfigError
from nemo_r3.precision import Precision


def resolve_layer_spec(asked: str, precision: Precision, on_cuda: bool) -> str:
    """Resolves `actor.layer_spec` to "te" or "local".

    auto leaves out Transformer Engine for fp32, which it would multiply in TF32.

    Raises:
        ConfigError: Transformer Engine is needed and cannot be imported, or has no GPU to run on.
    """
    if asked == "auto":
        asked = "te" if on_cuda and precision.name != "fp32" else "local"
    if precision.fp8 is not None and asked != "te":
        raise ConfigError(f"actor.precision={precision.name} needs Transformer Engine's layers on a GPU")
    if asked == "te" and not on_cuda:
        raise ConfigError("actor.layer_spec=te: Transformer Engine needs a CUDA device (allowed here: auto, local)")
    if asked == "te" and not HAVE_TE:
        raise ConfigError(
            "actor.layer_spec: Transformer Engine cannot be imported; install transformer-engine[pytorch], "
            "or ask for the slower actor.layer_spec=local"
        )
    return asked


def block_spec(config: TransformerConfig, kind: str) -> TransformerBlockSubmodules:
    """The spec of this pipeline stage's layers; `kind` is "te" or "local".

    Transformer Engine's layers fold each norm into the matrix after it; see `models.names.fused_norm_name`.
    """
    num_layers = config.num_layers // config.pipeline_model_parallel_size
    experts = config.num_moe_experts
    if kind == "te":
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=experts is not None, qk_layernorm=config.qk_layernorm
        )
        layer.submodules.self_attention.submodules.core_attention = SharedContextAttention
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    layer = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if experts is not None:  # in checkpoints, the norm before them keeps its name, as with Transformer Engine
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SharedContextAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, marked so that its gradient is summed over sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
