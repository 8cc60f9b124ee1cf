"""FLOPs of training and sampling, counted from a model's shape (arXiv 2104.04473, section 5.1), and peaks of GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nemo_r3.algo.balance import Cost
from nemo_r3.models.architecture import Architecture
from nemo_r3.types import Group, Reflection

FORWARD_AND_BACKWARD = 3
"""Times the forward pass: backward multiplies by every matrix twice."""


def training_cost(arch: Architecture, lora: bool = False) -> Cost:
    """FLOPs of forward and backward, of experts only those that a token passes; a multiply-add counts as 2.

    With LoRA no weight has a gradient, and its factors do not count.
    """
    return _cost(arch, FORWARD_AND_BACKWARD, weights=2 if lora else FORWARD_AND_BACKWARD)


def scoring_cost(arch: Architecture) -> Cost:
    """FLOPs of the forward pass alone, with the head where there is a target."""
    return _cost(arch, 1, weights=1)


def _cost(arch: Architecture, passes: int, weights: int) -> Cost:
    """FLOPs of what takes `passes` times a forward pass of attention, and `weights` times one through the weights."""
    layer = 2 * (arch.query_width + arch.key_width) + 3 * arch.active_columns
    router = arch.experts.count if arch.experts else 0
    return Cost(
        per_token=weights * 2 * arch.num_layers * arch.hidden_size * (layer + router),
        per_pair=passes * 4 * arch.num_layers * arch.query_width,
        per_target=weights * 2 * arch.hidden_size * arch.vocab_size,
    )


def step_flops(updates: Sequence[tuple[float, float]], reference: bool) -> float:
    """FLOPs of a step's updates and of the passes that score for them, given what each costs to train on and to score.

    Before the first update the reference scores the rows of all, and the old policy those of the later ones.
    """
    trained, scored = zip(*updates, strict=True)
    return sum(trained) + sum(scored[1:]) + (sum(scored) if reference else 0)


def rollout_flops(arch: Architecture, groups: Iterable[Group]) -> float:
    """FLOPs of sampling groups with a KV cache: each group's context counts once, what follows it once per reflection,
    and the head once per sampled token."""
    cost, total = scoring_cost(arch), 0.0
    for group in groups:
        shared = _shared(group.reflections[0])
        own = [len(it.trajectory) - shared - 1 for it in group.reflections]  # the last token is never read
        sampled = sum(len(it.answer.segment.ids) + len(it.retry.segment.ids) for it in group.reflections)
        total += cost.flops(shared, own, sampled)
    return total


def _shared(reflection: Reflection) -> int:
    """Tokens before a reflection, the same in its whole group."""
    own = reflection.trajectory.segments.index(reflection.answer.segment)
    return sum(len(segment.ids) for segment in reflection.trajectory.segments[:own])


PEAKS = (  # dense, from NVIDIA's data sheets; the first part that a GPU's name contains counts
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
    """Peak FLOP/s of a GPU in `actor.precision`; None if unknown, and always for fp32."""
    for name, bf16, fp8 in PEAKS:
        if name in chip:
            return fp8 if "fp8" in precision else bf16 if precision == "bf16" else None
    return None


def speed(phase: str, flops: float, seconds: float, ranks: int, chip: str, precision: str) -> dict[str, float]:
    """A rank's average rate: `speed/<phase>_tflops`, and `speed/<phase>_mfu` if the chip's peak is known.

    The FLOPs are those of all ranks together; `precision` is as in `actor.precision` or `rollout.quantization`.
    """
    done, peak = flops / seconds / ranks, peak_of(chip, precision)
    return {f"speed/{phase}_tflops": done / 1e12} | ({} if peak is None else {f"speed/{phase}_mfu": done / peak})
