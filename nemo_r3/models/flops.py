"""What training on a model costs, counted from its shape (arXiv 2104.04473, section 5.1), and what chips can do."""

from __future__ import annotations

from nemo_r3.algo.balance import Cost
from nemo_r3.models.architecture import Architecture

FORWARD_AND_BACKWARD = 3
"""Times the forward pass: backward multiplies by every matrix twice."""


def training_cost(arch: Architecture) -> Cost:
    """FLOPs of forward and backward; a multiplication with its addition counts as 2."""
    queries, keys = arch.num_heads * arch.head_dim, 2 * arch.num_kv_heads * arch.head_dim
    layer = arch.hidden_size * (2 * queries + keys + 3 * arch.ffn_hidden_size)
    return Cost(
        per_token=FORWARD_AND_BACKWARD * 2 * arch.num_layers * layer,
        per_pair=FORWARD_AND_BACKWARD * 4 * arch.num_layers * queries,
        per_target=FORWARD_AND_BACKWARD * 2 * arch.hidden_size * arch.vocab_size,
    )


PEAKS = (  # dense, of NVIDIA's data sheets; a name holds the first of these that it contains
    ("H100 PCIe", 756e12, 1513e12),
    ("H100 NVL", 835e12, 1671e12),
    ("H100", 989e12, 1979e12),
    ("H200 NVL", 835e12, 1671e12),
    ("H200", 989e12, 1979e12),
    ("GH200", 989e12, 1979e12),
    ("GB200", 2500e12, 5000e12),
    ("B200", 2250e12, 4500e12),
    ("A100", 312e12, None),
)
"""Parts of `torch.cuda.get_device_name()`, FLOP/s in BF16, and in FP8 where the chip has it."""


def peak_of(chip: str, precision: str) -> float | None:
    """FLOP/s that a GPU reaches at most in `actor.precision`; None where that is not known, fp32 among it."""
    for name, bf16, fp8 in PEAKS:
        if name in chip:
            return fp8 if "fp8" in precision else bf16 if precision == "bf16" else None
    return None


def speed(flops: float, seconds: float, ranks: int, chip: str, precision: str) -> dict[str, float]:
    """What a rank did on average: `speed/update_tflops`, and `speed/update_mfu` where the chip's peak is known."""
    done, peak = flops / seconds / ranks, peak_of(chip, precision)
    return {"speed/update_tflops": done / 1e12} | ({} if peak is None else {"speed/update_mfu": done / peak})
