"""nemo_r3: Reflect, Retry, Reward (arXiv 2505.24726) on megatron-core and vLLM."""

__version__ = "0.1.0"
