"""Policies of Transformer Engine's layers on a GPU that is pretended (`pretended_te.py`), in each of its precisions.

python te_policies.py one HOME
python te_policies.py families HOME                      every family, in BF16
torchrun --nproc-per-node=2 te_policies.py tp2 HOME      with sequence parallelism
torchrun --nproc-per-node=2 te_policies.py dp2 HOME
torchrun --nproc-per-node=2 te_policies.py experts HOME  at EP2 and at TP2, in BF16, with and without LoRA
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] = "1"  # as `fp8_support.prepare` would, before the next import
import families  # noqa: E402
import torch  # noqa: E402
from data import batch_of, make_models, sequences, split_batch  # noqa: E402
from devices import life as life_on_a_gpu  # noqa: E402
from lab import Lab, save_at_work  # noqa: E402
from pretended_gpu import pretend, storages  # noqa: E402
from pretended_te import PRODUCTS, pretend_te  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from nemo_r3 import entry, fp8_support  # noqa: E402
from nemo_r3.actor import checkpoint  # noqa: E402
from nemo_r3.actor.manifest import latest  # noqa: E402
from nemo_r3.actor.numerics import LayerWatch  # noqa: E402
from nemo_r3.actor.policy import Policy  # noqa: E402
from nemo_r3.actor.trainer import Trainer  # noqa: E402
from nemo_r3.algo.objective import Objective  # noqa: E402
from nemo_r3.export import export  # noqa: E402
from nemo_r3.models import model_path  # noqa: E402
from nemo_r3.precision import precision_of, without_fp8  # noqa: E402
from nemo_r3.types import UpdateBatch  # noqa: E402

ROWS = 600
"""As if the batch were one of that many, so that gradients are as small as a run's."""
LAYOUTS = {
    "one": ("bf16", "fp8-tensorwise", "fp8-blockwise", "fp8-delayed", "fp8-delayed+lora"),
    # on two ranks the model's matrices are no multiples of 128
    "tp2": ("bf16", "fp8-tensorwise", "fp8-delayed", "fp8-tensorwise+lora"),
    "dp2": ("bf16", "fp8-tensorwise"),
}


def batch(given: UpdateBatch | None = None) -> UpdateBatch:
    given = given or batch_of()
    rows = (replace(row, loss_weights=[weight / ROWS for weight in row.loss_weights]) for row in given.rows)
    return replace(given, rows=tuple(rows))


def life(lab: Lab, layout: str, name: str) -> dict[str, Any]:
    """A policy's log-probabilities, save before any update, products, updates, resume, export, and layers in BF16."""
    precision, _, lora = name.partition("+")
    settings = {
        "precision": precision,
        "lora_rank": 4 if lora else 0,
        "lr": 1e-4,
        "lr_min": 1e-4,
        "sequence_parallel": layout == "tp2",
    }
    trainer, again = (lab.trainer(layout, "embedded", **settings) for _ in range(2))
    policy = trainer.policy
    if name != "fp32":
        fp8_support.prepare(policy.config, policy.arch)
    scores = [row.tolist() for row in policy.score(sequences())]
    checkpoint.load(again, save_at_work(trainer, lab.home / f"te-{layout}-{name}-first", 0, {}, keep=1))
    PRODUCTS.clear()
    metrics = [trainer.update(batch())]
    products = dict(PRODUCTS)
    recomputed = lab.trainer(layout, "embedded", recompute="full", **settings).update(batch()) if lora else metrics[0]
    exact = lab.trainer(layout, "embedded", **settings | {"precision": "fp32"}).update(batch())["grad_norm"]
    watch = LayerWatch(policy.module, precision_of(policy.config).fp8)
    with watch.watching():
        metrics.append(trainer.update(batch()))
    found = {
        "scores": scores,
        "products": products,
        "layers": watch.rows(lab.world),
        "nan": lab.nan(trainer),
        "exact": exact,
    }
    found["recomputed"] = recomputed == metrics[0]
    home = lab.home / f"te-{layout}-{name}"
    save_at_work(trainer, home, 2, {}, keep=1)
    checkpoint.load(again, latest(home))
    before = storages()
    metrics.append(trainer.update(batch()))
    found["behind"] = [size for storage, size in storages().items() if storage not in before]
    after = [trainer.update(batch())]  # of the weights that the update before has made
    resumed = [again.update(batch()) for _ in range(2)]
    found |= {"metrics": metrics, "resumed": resumed == [metrics[-1], *after]}
    found["split"] = split_gap(lab, trainer, again)
    plain = Policy(without_fp8(policy.config), lab.world)
    checkpoint.load_weights(plain, latest(home))
    out = lab.home / f"te-{layout}-{name}-export"
    found["exported"], _ = export(plain, model_path(policy.config), out, "", sequences()[:4])
    if "fp8" in name:
        PRODUCTS.clear()
        watch.leave_fp8([1])
        trainer.update(batch())
        found["left"] = dict(PRODUCTS)
    return found


def split_gap(lab: Lab, together: Trainer, apart: Trainer) -> float:
    """How far a step of two updates is from two steps, of the same weights.

    RLOO knows no old policy. Nor is there a reference: in delayed scaling it reads with the scales that are there when
    it does, for all updates before the first.
    """
    whole = batch(split_batch())
    for trainer in (together, apart):
        trainer._objective = Objective(replace(trainer.policy.config.algo, loss="rloo", kl_beta=0.0))
        trainer._reference = None
    together.update(whole)
    for rows in whole.updates:
        apart.update(replace(whole, rows=tuple(rows)))
    ours, theirs = (lab.weights(trainer.policy) for trainer in (together, apart))
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def family(lab: Lab, kind: str) -> dict[str, Any]:
    """How far from transformers, and from float32's first gradient, and whether the weights come back."""
    trainer, exact = lab.trainer("one", kind, precision="bf16"), lab.trainer("one", kind)
    policy = trainer.policy
    given = load_file(lab.home / kind / "model.safetensors")
    exported = {name: tensor.cpu() for name, tensor in policy.export_hf()}
    scored = enumerate(policy.score(sequences()))
    gaps = torch.cat([(ours - lab.expected[f"{kind} 0.7 {number}"]).abs() for number, ours in scored])
    return {
        "score": [gaps.mean().item(), gaps.max().item()],
        "export": exported.keys() == given.keys()
        and all(torch.equal(tensor, given[name].bfloat16()) for name, tensor in exported.items()),
        "norms": [one.update(batch_of())["grad_norm"] for one in (trainer, exact)],
    }


def experts(lab: Lab, layout: str, lora_rank: int) -> dict[str, Any]:
    """All that a run does with a policy, offloaded and recomputed, and float32's first gradient."""
    settings: dict[str, Any] = {"offload_optimizer": True, "recompute": "full", "lora_rank": lora_rank}
    found = life_on_a_gpu(lab, layout, "qwen3_moe", precision="bf16", **settings)
    return found | {"exact": lab.trainer(layout, "qwen3_moe", lora_rank=lora_rank).update(batch_of())["grad_norm"]}


def te_policies(arguments: Sequence[str]) -> None:
    layout, home = arguments
    if layout in ("families", "experts") and os.environ.get("RANK", "0") == "0":
        make_models(Path(home))
    pretend_te()
    pretend()
    lab = Lab(Path(home))
    if layout == "families":
        lab.note("policies", {kind: family(lab, kind) for kind in families.KINDS})
        return
    if layout == "experts":
        cases = itertools.product(("ep2", "tp2"), (0, 4))
        lab.note("policies", {f"{at}, LoRA {rank}": experts(lab, at, rank) for at, rank in cases})
        return
    found = {name: life(lab, layout, name) for name in ("fp32", *LAYOUTS[layout])}
    exact = [score for row in found["fp32"]["scores"] for score in row]
    for one in found.values():
        scores = [score for row in one.pop("scores") for score in row]
        one["gap"] = statistics.fmean(abs(ours - theirs) for ours, theirs in zip(scores, exact, strict=True))
    lab.note("policies", found)


if __name__ == "__main__":
    entry.main(te_policies)
