"""The layer spec: which modules a transformer layer is made of, on each platform."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nemo_r3.errors import ConfigError

try:
    import transformer_engine  # noqa: F401

    HAVE_TE = True
except ImportError:
    HAVE_TE = False


def resolve_layer_spec(asked: str, on_cuda: bool) -> str:
    """ "te" or "local" for `actor.layer_spec`.

    Raises:
        ConfigError: Transformer Engine is needed and cannot be imported, or has no GPU to run on.
    """
    if asked == "auto":
        asked = "te" if on_cuda else "local"
    if asked == "te" and not on_cuda:
        raise ConfigError("actor.layer_spec=te: Transformer Engine needs a CUDA device (allowed here: auto, local)")
    if asked == "te" and not HAVE_TE:
        raise ConfigError(
            "actor.layer_spec: Transformer Engine cannot be imported; install transformer-engine[pytorch], "
            "or ask for the slower actor.layer_spec=local"
        )
    return asked


def block_spec(config: TransformerConfig, kind: str, num_layers: int) -> ModuleSpec | TransformerBlockSubmodules:
    """The spec of this pipeline stage's `num_layers` layers; `kind` is "te" or "local"."""
    if kind == "te":
        return get_gpt_layer_with_transformer_engine_spec()
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = PackedAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, marked so that its gradient is summed over sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(nn.Module):
    """Causal attention inside each sequence of a packed row, by torch's SDPA.

    Takes query [tokens, heads, head_dim] and key, value [tokens, kv_heads, head_dim] of this tensor-parallel
    rank with `PackedSeqParams` in "thd" format; returns [tokens, heads * head_dim].
    """

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.grouped = divide(config.num_attention_heads, config.num_query_groups or config.num_attention_heads) > 1

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """Attends; see the class for shapes."""
        assert packed_seq_params is not None, "the actor always packs"
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        outputs = [
            self._attend(query[start:end], key[start:end], value[start:end])
            for start, end in zip(bounds, bounds[1:], strict=False)
        ]
        return torch.cat(outputs).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # [tokens, heads, head_dim] -> [1, heads, tokens, head_dim], as SDPA wants it
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return attended.squeeze(0).transpose(0, 1)
