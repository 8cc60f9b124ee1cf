"""Builds this rank's shard of the policy: parallel groups, TransformerConfig, `Trunk`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import silu

from nemo_r3.actor.scales import keep_scales
from nemo_r3.actor.spec import block_spec, resolve_layer_spec
from nemo_r3.actor.weights import mark_tensor_parallel
from nemo_r3.config import ActorConfig, Config
from nemo_r3.models import Architecture
from nemo_r3.models.architecture import Experts
from nemo_r3.precision import Precision, precision_of
from nemo_r3.runtime import World


def start_parallel_groups(config: Config) -> None:
    """Makes megatron-core's tensor, pipeline, data and expert-parallel groups; once per process."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.actor.tensor_parallel,
        pipeline_model_parallel_size=config.actor.pipeline_parallel,
        expert_model_parallel_size=config.actor.expert_parallel,
        expert_tensor_parallel_size=config.actor.expert_tensor_parallel,
        distributed_timeout_minutes=config.run.timeout_minutes,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(config.seed)


def connect(config: Config, arch: Architecture, world: World) -> None:
    """Has NCCL connect the groups of a training run, which it would do at each one's first collective, in an update.

    Each takes GPU memory for good, hundreds of MB. So the engine, which starts next, must find it taken. And ranks that
    cannot reach each other end the run now, not after its first rollout. megatron-core has connected the group of a
    tied embedding when it built the model.
    """
    fp8 = precision_of(config).fp8
    groups = [
        dist.group.WORLD,
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_intra_distributed_optimizer_instance_group(),
    ]
    if arch.experts is not None:
        groups += [
            parallel_state.get_expert_tensor_parallel_group(),
            parallel_state.get_expert_tensor_and_model_parallel_group(),
        ]
    if config.actor.expert_parallel > 1:
        groups += [
            parallel_state.get_expert_model_parallel_group(),
            parallel_state.get_expert_data_parallel_group(),
        ]
    if fp8 is not None and fp8.delayed:
        groups.append(parallel_state.get_amax_reduction_group(with_context_parallel=True))
    number = torch.zeros(1, device=world.device)
    for group in groups:
        if dist.get_world_size(group) > 1:
            dist.all_reduce(number, group=group)
    if (ranks := config.actor.expert_parallel) > 1:  # NCCL connects each pair of ranks for it
        tokens = torch.zeros(ranks, device=world.device)
        dist.all_to_all_single(torch.empty_like(tokens), tokens, group=parallel_state.get_expert_model_parallel_group())


def transformer_config(
    actor: ActorConfig, arch: Architecture, precision: Precision, on_cuda: bool
) -> TransformerConfig:
    """megatron-core's view of the architecture and of the actor's settings."""
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        moe_ffn_hidden_size=arch.ffn_hidden_size if arch.experts else None,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        no_rope_freq=[int(layer in arch.nope_layers) for layer in range(arch.num_layers)],  # read by attention.py
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # layout
        tensor_model_parallel_size=actor.tensor_parallel,
        pipeline_model_parallel_size=actor.pipeline_parallel,
        sequence_parallel=actor.sequence_parallel,
        variable_seq_lengths=actor.pipeline_parallel > 1,
        moe_token_dispatcher_type="alltoall",  # 0.16.1 wants it for variable_seq_lengths, without experts, too
        **(_expert_fields(actor, arch.experts, precision) if arch.experts else {}),
        **precision.transformer_fields(),
        # the loss carries global denominators: gradients are summed, never averaged
        calculate_per_token_loss=True,
        # memory
        recompute_granularity=None if actor.recompute == "none" else actor.recompute,
        recompute_method="uniform" if actor.recompute == "full" else None,
        recompute_num_layers=1 if actor.recompute == "full" else None,
        # weights are loaded, never drawn
        use_cpu_initialization=not on_cuda,
        perform_initialization=False,
        # fusions: on where they pay; off on a CPU, and where they need Apex (`sum_gradients_in_place` needs none)
        bias_activation_fusion=on_cuda,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def _expert_fields(actor: ActorConfig, experts: Experts, precision: Precision) -> dict[str, Any]:
    """The experts' part of `transformer_config`: no token is dropped, and no loss but the policy's moves the router."""
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": not experts.normalized,  # a softmax over the chosen experts alone adds up to 1
        "moe_router_dtype": "fp32" if precision.bf16 else "fp64",  # fp32 would be TF32 with Transformer Engine
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": actor.expert_parallel,
        "expert_tensor_parallel_size": actor.expert_tensor_parallel,
    }


class Trunk(GPTModel):  # type: ignore[misc]
    """A stage of the policy that ends in hidden states; `head.py` computes logits where they are needed."""

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """[tokens (/ tensor_parallel under sequence parallel), 1, hidden_size], on every stage."""
        return hidden_states

    def head_weight(self) -> Tensor:
        """[vocabulary / tensor_parallel, hidden_size], on the last stage."""
        weight: Tensor = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return weight


def build_model(config: Config, arch: Architecture, world: World) -> Trunk:
    """This rank's part of the policy, its weights not yet loaded.

    Raises:
        ConfigError: the layer spec that is asked for cannot run here.
    """
    on_cuda, precision = world.device.type == "cuda", precision_of(config)
    kind = resolve_layer_spec(config.actor.layer_spec, precision, on_cuda)
    model = trunk(transformer_config(config.actor, arch, precision, on_cuda), arch, kind)
    model = model.to(device=world.device, dtype=precision.dtype)
    mark_tensor_parallel(model, arch)
    if kind == "te":
        if not config.actor.lora_rank:  # with which no weight has a gradient
            sum_gradients_in_place(model)
        keep_scales(model, delayed=precision.fp8 is not None and precision.fp8.delayed)
    return model


def sum_gradients_in_place(model: nn.Module) -> None:
    """Makes Transformer Engine's layers add their weights' gradients to the float32 sums themselves.

    megatron-core has a switch for that, but without Apex its own embedding and head refuse it.
    """
    parts: Iterator[Any] = model.modules()
    for part in parts:
        if hasattr(part, "fuse_wgrad_accumulation"):
            part.fuse_wgrad_accumulation = True


def trunk(tf_config: TransformerConfig, arch: Architecture, kind: str) -> Trunk:
    """This stage's modules, of the layer spec `kind`, on the device where megatron-core makes parameters."""
    return Trunk(
        config=tf_config,
        transformer_layer_spec=block_spec(tf_config, kind),
        vocab_size=arch.padded_vocab(tf_config.tensor_model_parallel_size),
        max_sequence_length=arch.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="none",  # attention.py turns by the layout's positions
    )
