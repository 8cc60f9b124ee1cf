"""Shared contexts against a row per reflection, on one real policy: the loss, and the gradient of every tensor."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import patch

import torch
from data import batch_of
from families import VOCAB
from lab import Lab

from nemo_r3.actor import cpu
from nemo_r3.actor.trainer import Trainer
from nemo_r3.algo import balance
from nemo_r3.types import Phase, Row

CASES: dict[str, list[tuple[int, list[int]]]] = {  # (context, reflections) of each group, in tokens
    "one reflection": [(40, [9])],
    "two": [(33, [5, 17])],
    "sixteen": [(50, [1 + 3 * number % 11 for number in range(16)])],
    "several groups in a row": [(45, [3, 9, 1]), (20, [7] * 8), (1, [12, 5]), (10, [1] * 4)],
    "longer than the budget": [(80, [30, 40, 25, 38, 44])],
    "a short context": [(10, [30, 28, 31, 30, 27])],
}
BUDGET = 160


def rows_of(groups: list[tuple[int, list[int]]]) -> list[Row]:
    """Rows with given advantages, none of them 0."""
    draw = random.Random(5)
    count = sum(len(lengths) for _, lengths in groups)
    rows = []
    for group, (context, lengths) in enumerate(groups):
        shared = [draw.randrange(VOCAB) for _ in range(context)]
        for length in lengths:
            advantage = draw.choice((-1, 1)) * draw.uniform(0.5, 2)
            row = Row(
                ids=shared + [draw.randrange(VOCAB) for _ in range(length)],
                phases=[Phase.TASK] * context + [Phase.REFLECTION] * length,
                sampled=[False] * context + [True] * length,
                advantages=[0.0] * context + [advantage] * length,
                loss_weights=[0.0] * context + [1 / count / length] * length,
                rollout_logprobs=[0.0] * context + [draw.uniform(-6, -3) for _ in range(length)],
                group=group,
                shared=context,
            )
            rows.append(row)
    return rows


def gradients(trainer: Trainer, rows: list[Row], shared_context: bool) -> tuple[dict[str, float], Any, list[int]]:
    """(sums, gradient by parameter, tokens of each microbatch) of a step that is not taken."""
    trainer.policy.config.actor.shared_context = shared_context
    microbatches, _ = trainer.policy.microbatches(rows)
    with cpu.cuda_stand_in():
        sums = trainer._accumulate(microbatches, *trainer._given([microbatches])[0])
    found = {name: parameter.main_grad.clone() for name, parameter in trainer.policy.module.named_parameters()}
    return sums, found, [len(microbatch.ids) for microbatch in microbatches]


def shared_and_separate(lab: Lab, layout: str, kind: str, **actor: Any) -> None:
    """Notes the differences of every case, the largest over all ranks."""
    trainer = lab.trainer(layout, kind, microbatch_tokens=BUDGET, **actor)
    trainer.update(batch_of())  # so that the reference is another model, and the KL counts
    found = {}
    for case, groups in CASES.items():
        rows = rows_of(groups)
        with patch.object(balance, "LEAST_TOKENS", 20):  # so that a pipeline gets more microbatches
            sums, ours, tokens = gradients(trainer, rows, shared_context=True)
        expected, theirs, more_tokens = gradients(trainer, rows, shared_context=False)
        gaps = [((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs]
        found[case] = {
            "loss": sums["loss"],
            "loss_gap": abs(sums["loss"] - expected["loss"]),
            "kl": sums["kl"],
            "gradient_gap": max(gap for gaps in lab.world.gather(gaps) for gap in gaps),
            "least_gradient": min(torch.stack([gradient.norm() for gradient in theirs.values()]).tolist()),
            "tokens": tokens,
            "separate_tokens": more_tokens,
        }
    trainer.policy.config.actor.shared_context = True
    lab.note("-".join(["shared", layout, kind, *actor.values()]), found)
