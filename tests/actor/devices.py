"""Policies on a GPU that is pretended (`pretended_gpu.py`), in two layouts: every tensor has to be where it should."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from data import LENGTHS, batch_of, sequences
from lab import Lab, largest_gap, save_at_work
from pretended_gpu import CONNECTED, storages
from refusals import refusal
from routed import drawn, replayed
from safetensors.torch import load_file

from nemo_r3.actor import checkpoint
from nemo_r3.actor.manifest import latest
from nemo_r3.actor.numerics import LayerWatch
from nemo_r3.actor.policy import Policy
from nemo_r3.types import UpdateBatch

POLICIES = {
    "fp32": {},
    "bf16": {"precision": "bf16", "layer_spec": "local", "offload_optimizer": True, "recompute": "full"},
    "lora": {"precision": "bf16", "layer_spec": "local", "offload_optimizer": True, "lora_rank": 4},
}
"""Without Transformer Engine, whose kernels need a real one."""


def devices(lab: Lab) -> None:
    """All that a run does with a policy, at TP2 with sequence parallelism and at PP2, and one with experts at EP2."""
    lab.note("mixed", {name: refusal(act, RuntimeError) for name, act in mixed().items()})
    for layout, more in (("tp2", {"sequence_parallel": True}), ("pp2", {})):
        for kind, (name, actor) in zip(("qwen2", "llama_tied", "qwen2"), POLICIES.items(), strict=True):
            lab.note(f"{layout}-{name}", life(lab, layout, kind, **actor, **more))
    lean = {"offload_optimizer": True, "recompute": "full"}
    lab.note("ep2-experts", life(lab, "ep2", "qwen3_moe", **lean))
    routed = replayed(batch_of(), drawn())
    replay = life(lab, "ep2", "qwen3_moe", routed, lora_rank=4, routing_replay=True, **lean)
    lab.note("ep2-experts+lora+replay", replay)


def mixed() -> dict[str, Callable[[], Any]]:
    """What CUDA would refuse, each by its name."""
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    return {
        "add": lambda: here + there,
        "add in place": lambda: there.add_(here),
        "matrix": lambda: here[None] @ there[:, None],
        "concatenate": lambda: torch.cat([here, there]),
        "index": lambda: here[torch.tensor([0], device="cuda")],
        "number": lambda: here * there.sum(),
        "collective": lambda: dist.all_reduce(here),
        "backward": lambda: (there.clone().requires_grad_() * there).backward(here),
    }


def life(lab: Lab, layout: str, kind: str, batch: UpdateBatch | None = None, **actor: Any) -> dict[str, Any]:
    """Scores, a watched update, a checkpoint read by a second policy, another update, an export."""
    batch = batch or batch_of()
    trainer, again = (lab.trainer(layout, kind, **actor) for _ in range(2))
    policy, connected = trainer.policy, set(CONNECTED)
    expected = [lab.expected[f"{kind} 0.7 {number}"] for number in range(len(LENGTHS))]
    found: dict[str, Any] = {"score": largest_gap(policy.score(sequences()), expected)}
    watch = LayerWatch(policy.module, None)
    with watch.watching():
        metrics = [trainer.update(batch)]
    found["layers"] = len(watch.rows(lab.world))
    home = lab.home / f"devices-{layout}-{kind}"
    save_at_work(trainer, home, 1, {}, keep=1)
    checkpoint.load(again, latest(home))
    before = storages()
    metrics.append(trainer.update(batch))
    return found | {
        "metrics": metrics,
        "left": left_behind(before),
        "resumed": again.update(batch) == metrics[-1],
        "nan": lab.nan(trainer),
        "held": trainer.held(),
        "exported": sorted({str(tensor.device) for _, tensor in policy.export_hf()}),
        "apart": apart(lab, policy, kind),
        "parameters": sorted({str(parameter.device) for parameter in policy.module.parameters()}),
        "connected late": [what for name, what in CONNECTED.items() if name not in connected],
    }


def apart(lab: Lab, policy: Policy, kind: str) -> float:
    """How far the weights are from the starting ones with the products of LoRA's factors; 0 on ranks but the first."""
    if policy.lora is None:
        return 0.0
    factors, ours = policy.lora.whole(lab.world), lab.weights(policy)
    start, gaps = load_file(lab.home / kind / "model.safetensors"), [0.0]
    scale = policy.config.actor.lora_alpha / policy.config.actor.lora_rank
    for name in {name.rpartition(".")[0] for name in factors}:
        product = scale * factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"]
        dtype = ours[name].dtype
        gap = ours[name].cpu() - (start[name].to(dtype) + product).to(dtype)
        gaps.append((gap.abs().mean() / product.abs().mean()).item())
    return max(gaps)


def left_behind(before: dict[int, int]) -> int:
    """Bytes of the storages that are new and stay; gloo's threads may hold a collective's for a moment longer."""
    for _ in range(50):
        if not (left := sum(size for storage, size in storages().items() if storage not in before)):
            break
        time.sleep(0.1)
    return left
