"""What one change to the update's kernels is worth, each measured against the update as it is, in turns in one process.

    swiglu        SwiGLU without megatron-core's fusion (bias_activation_fusion), on a CPU with it
    main_grad     weights' gradients in BF16, then added to the float32 sums, by Transformer Engine's layers too
    eager         what `fused` compiles (rotary positions, merged attention, the head's softmax) as torch runs it
    head_chunk_N  the head in chunks of 2^N logits
    keep_memory   torch's allocator keeps its memory from one update to the next

`ratio_*` is the median over rounds of the time against the update's just before: below 1 where the change makes it
faster. `moved_*` is the largest change of a log-probability, `grad_norm_*` the relative one of the gradient norm;
`peak_*` GiB of torch's allocator, 0 on a CPU. Where float32's numbers are at hand (`update.py`), `prob_error_*` is the
distance from those. `peak` and `prob_error` are the update's as it is.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from benchmarks.gpu_check.update import arguments, batch_of, distance, float32_of, scores, started, timed
from nemo_r3 import memory
from nemo_r3.errors import ConfigError
from nemo_r3.files import write_whole
from nemo_r3.units import GIB

if TYPE_CHECKING:
    from nemo_r3.actor.policy import Policy

ROUNDS, SMALL_ROUNDS = 3, 1
CHUNKS = (26, 27, 29)
Change = Callable[[], AbstractContextManager[object]]
"""Is made for as long as its context lasts."""


def changes(policy: Policy) -> dict[str, Change]:
    """Those that this policy's modules and device have."""
    from nemo_r3.actor import fused, head

    device, config = policy.world.device.type, policy.module.config
    found: dict[str, Change] = {
        "swiglu": partial(patch.object, config, "bias_activation_fusion", not config.bias_activation_fusion)
    }
    if fusing := [part for part in policy.module.modules() if hasattr(part, "fuse_wgrad_accumulation")]:
        found["main_grad"] = partial(all_of, [patch.object(part, "fuse_wgrad_accumulation", False) for part in fusing])
    if device == "cuda":
        found["eager"] = partial(patch.object, fused, "_compiled", lambda function: function)
        found["keep_memory"] = partial(patch.object, torch.cuda, "empty_cache", lambda: None)
    chunks = {f"head_chunk_{bits}": {device: 2**bits} for bits in CHUNKS}
    return found | {name: partial(patch.dict, head.CHUNK_ELEMENTS, chunk) for name, chunk in chunks.items()}


@contextmanager
def all_of(patches: Sequence[AbstractContextManager[object]]) -> Iterator[None]:
    """Several as one."""
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield


def measure(shape: str, arithmetic: str, rounds: int) -> Iterator[dict[str, Any]]:
    """All results so far, again after each change; or `skipped` with the reason."""
    try:
        trainer = started(shape, arithmetic)
    except ConfigError as error:
        yield {"skipped": str(error)}
        return
    policy = trainer.policy
    batch = batch_of(policy, shape)

    def run() -> tuple[float, float]:
        """Seconds and gradient norm; the update before it compiles, and leaves the allocator as this change does."""
        timed(trainer, batch)
        seconds, metrics = timed(trainer, batch)
        return seconds, metrics["grad_norm"]

    _, norm = run()
    found = {"peak": memory.peak() / GIB}
    plain = scores(policy, batch)
    if (reference := float32_of(shape)) is not None:
        found["prob_error"] = distance(plain, reference["logprobs"])["prob_error"]
    for name, change in changes(policy).items():
        ratios = []
        for _ in range(rounds):
            before, _ = run()
            with change():
                seconds, changed_norm = run()
            ratios.append(seconds / before)
        found[f"peak_{name}"] = memory.peak() / GIB
        with change():
            ours = scores(policy, batch)
        found[f"ratio_{name}"] = statistics.median(ratios)
        found[f"moved_{name}"] = distance(ours, plain)["largest_gap"]
        found[f"grad_norm_{name}"] = abs(changed_norm / norm - 1)
        if reference is not None:
            found[f"prob_error_{name}"] = distance(ours, reference["logprobs"])["prob_error"]
        yield found


def main() -> None:
    """Writes what was found as JSON, after each change: one that fails costs only those after it."""
    options = arguments(__doc__)
    for found in measure(options.shape, options.precision, SMALL_ROUNDS if options.small else ROUNDS):
        write_whole(options.out, json.dumps(found))


if __name__ == "__main__":
    main()
