"""`actor`: the megatron-core policy, its layout and its optimizer."""

from dataclasses import dataclass

from nemo_r3.config.option import option


@dataclass
class ActorConfig:
    """Layout, precision and AdamW of the policy. Defaults are the paper's, where it states them."""

    tensor_parallel: int = option(1, low=1, help="ranks that share each layer's matrices", resume=True)
    pipeline_parallel: int = option(1, low=1, help="ranks that share the layers", resume=True)
    expert_parallel: int = option(
        1,
        low=1,
        help="ranks of a pipeline stage that share a layer's experts, whole ones; 1: tensor_parallel cuts each expert",
        resume=True,
    )
    routing_replay: bool = option(
        False,
        help="send each token to the experts that vLLM sent it to (rollout routing replay); verl's "
        "`router_replay.mode=R3`",
    )
    sequence_parallel: bool = option(
        False, help="split norms and residuals over the tensor-parallel ranks", resume=True
    )
    precision: str = option(
        "bf16",
        choices=("bf16", "fp8-tensorwise", "fp8-blockwise", "fp8-delayed", "mxfp8", "fp32"),
        help="arithmetic of the update; the rollout's is bf16, or fp32 with fp32; fp8 needs Transformer Engine",
    )
    layer_spec: str = option(
        "auto",
        choices=("auto", "te", "local"),
        help="auto: Transformer Engine on CUDA, except for fp32, which it would round to TF32; local elsewhere",
        resume=True,
    )
    offload_optimizer: bool = option(
        False,
        help="keep optimizer state in host memory between updates, the reference there always; free gradient buffers",
        resume=True,
    )
    recompute: str = option(
        "none",
        choices=("none", "selective", "full"),
        help="what the backward pass computes again instead of keeping it: full: each layer, one more forward pass; "
        "selective: attention alone, which saves little here; TRL's `gradient_checkpointing` is full",
        resume=True,
    )
    microbatch_tokens: int = option(
        8192,
        low=1,
        help="most tokens in a packed microbatch; a pipeline takes fewer where that is faster; in place of TRL's "
        "`per_device_train_batch_size`",
        resume=True,
    )
    shared_context: bool = option(
        True, help="lay a group's context once, before its reflections; false: once per reflection", resume=True
    )
    lora_rank: int = option(
        0,
        low=0,
        help="train only B and A, of this rank, in W + lora_alpha / lora_rank * B A for every matrix W of the layers, "
        "but for routers and experts; 0: train all weights; TRL's `lora_r`",
    )
    lora_alpha: float = option(32.0, above=0.0, help="scale of what lora_rank trains")
    lr: float = option(5e-7, low=0.0, help="peak learning rate; TRL's `learning_rate`")
    lr_min: float = option(0.0, low=0.0, help="learning rate at the end of the cosine")
    lr_decay_steps: int = option(
        0, low=0, help="length of the cosine, fixed for the run; 0: train.steps when the run first starts"
    )
    lr_warmup_ratio: float = option(0.03, low=0.0, high=1.0, help="share of lr_decay_steps spent warming up")
    weight_decay: float = option(0.0, low=0.0, help="AdamW's decoupled weight decay")
    adam_beta1: float = option(0.9, low=0.0, high=1.0, help="AdamW's first beta")
    adam_beta2: float = option(0.999, low=0.0, high=1.0, help="AdamW's second beta")
    adam_eps: float = option(1e-8, above=0.0, help="AdamW's epsilon")
    clip_grad: float = option(
        1.0, low=0.0, help="largest gradient norm; 0: no clipping; TRL's `max_grad_norm`, verl's `grad_clip`"
    )

    @property
    def expert_tensor_parallel(self) -> int:
        """Ranks that share each expert's matrices."""
        return self.tensor_parallel if self.expert_parallel == 1 else 1
