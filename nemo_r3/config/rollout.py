"""`rollout`: the vLLM engines and how they sample."""

from dataclasses import dataclass

from nemo_r3.config.option import option


@dataclass
class RolloutConfig:
    """vLLM and its sampling. There are world size / tensor_parallel engines, whatever the actor's layout."""

    tensor_parallel: int = option(1, low=1, help="ranks per vLLM engine", resume=True)
    quantization: str = option(
        "none",
        choices=("none", "fp8_per_tensor", "fp8_per_block"),
        help="vLLM's online FP8: the layers' bf16 weights are quantised at every refit, activations as they come; "
        "algo.mismatch_correction=tis makes up for the difference",
    )
    temperature: float = option(
        0.9, low=0.01, high=2.0, help="sampling temperature, in vLLM's limits; the actor divides its logits by it too"
    )
    top_p: float = option(
        1.0, low=1.0, high=1.0, help="nucleus sampling, off: a truncated distribution is not the policy's"
    )
    top_k: int = option(-1, low=-1, high=-1, help="top-k sampling, off for the same reason")
    max_answer_tokens: int = option(
        512, low=1, help="token limit of attempts and retries; TRL's `max_completion_length`"
    )
    max_reflection_tokens: int = option(256, low=1, help="token limit of reflections")
    max_model_len: int = option(4096, low=1, help="longest whole dialogue the engine holds, in tokens")
    deterministic: bool | None = option(
        None,
        help="a step sampled again gives the same, but for the rounding of a GPU's kernels: nothing is cached across "
        "steps; default: on CPU only",
    )
    prefix_caching: bool = option(True, help="reuse KV of shared contexts (reset at every refit)", resume=True)
    max_num_seqs: int = option(256, low=1, high=4096, help="sequences an engine decodes at once", resume=True)
    gpu_memory_utilization: float = option(
        0.5, above=0.0, high=1.0, help="share of each GPU that vLLM may use; the actor lives beside it", resume=True
    )
    cpu_kv_cache_gb: int = option(1, low=1, help="most KV cache of an engine on a CPU, in GiB", resume=True)
    enforce_eager: bool = option(False, help="no CUDA graphs (always so on a CPU)", resume=True)
    sleep: bool = option(
        True, help="free the engine's GPU memory during the update, where the platform can", resume=True
    )

    def token_limit(self, phase: str) -> int:
        """The most tokens that a sampled turn of this phase has."""
        return self.max_reflection_tokens if phase == "reflection" else self.max_answer_tokens
