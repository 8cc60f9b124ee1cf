"""Tokens that the mismatch correction rejects, against a batch that never had them: the second update of two policies.

Then one of the first, of which every token is rejected, and a step of two, of which the first is rejected.
"""

from __future__ import annotations

from dataclasses import replace

from data import SPLIT, batch_of, sequences
from lab import Lab

from nemo_r3.actor.trainer import Trainer
from nemo_r3.algo.objective import Objective
from nemo_r3.types import Row, UpdateBatch

WHOLE = 5
"""A row whose tokens are all rejected: it leaves the number of sequences, too."""


def rejection(lab: Lab, layout: str, kind: str) -> None:
    """Notes both second updates, how far apart the weights are then, and what later updates leave alone or out."""
    trainer, other = lab.trainer(layout, kind), lab.trainer(layout, kind)
    for one in (trainer, other):
        one.update(batch_of())  # away from the reference: now there is a KL
    trainer._objective = Objective(replace(trainer.policy.config.algo, mismatch_correction="icepop"))
    scores = [[0.0, *score.tolist()] for score in trainer.policy.score(sequences())]
    given = batch_of().rows
    rows = [sampled_as(row, scores[number], number) for number, row in enumerate(given)]
    kept = [without(row, logprobs, len(rows)) for row, logprobs in zip(rows, scores, strict=True)]
    found = trainer.update(UpdateBatch(tuple(rows), (), 1, 0))
    expected = other.update(UpdateBatch(tuple(kept), (), 1, 0))
    ours, theirs = lab.weights(trainer.policy), lab.weights(other.policy)
    gap = max((ours[name] - theirs[name]).abs().max().item() for name in theirs)
    far = UpdateBatch(tuple(replace(row, rollout_logprobs=[-99.0] * len(row)) for row in given), (), 1, 0)
    rejected, same = lab.unchanged(trainer, lambda: trainer.update(far))
    facts = {"found": found, "expected": expected, "weight_gap": gap, "rejected": rejected, "unchanged": same}
    facts |= half_rejected(trainer, other)
    lab.note(f"rejection-{layout}-{kind}", facts)


def half_rejected(trainer: Trainer, other: Trainer) -> dict[str, dict[str, float]]:
    """A step of two updates, of which all tokens of the first are rejected, and one that has the second alone."""
    scores, given = trainer.policy.score(sequences()), batch_of().rows
    first = [replace(given[number], rollout_logprobs=[-99.0] * len(given[number])) for number in SPLIT[0]]
    second = [replace(given[number], rollout_logprobs=[0.0, *scores[number].tolist()], update=1) for number in SPLIT[1]]
    return {
        "half_rejected": trainer.update(UpdateBatch((*first, *second), (), 1, 0)),
        "second_half": other.update(UpdateBatch(tuple(second), (), 1, 0)),
    }


def sampled_as(row: Row, logprobs: list[float], number: int) -> Row:
    """As if vLLM had sampled with the actor's probabilities, but for every third token and one whole row."""
    far = [10.0 if number == WHOLE or place % 3 == 0 else 0.0 for place in range(len(row))]
    return replace(row, rollout_logprobs=[logprob - gap for logprob, gap in zip(logprobs, far, strict=True)])


def without(row: Row, logprobs: list[float], rows: int) -> Row:
    """The row's rejected tokens have no weight; the others share its weight, and that of the row that is gone."""
    stays = [
        bool(weight) and abs(ours - theirs) < 1
        for weight, ours, theirs in zip(row.loss_weights, logprobs, row.rollout_logprobs, strict=True)
    ]
    if not any(stays):
        return replace(row, loss_weights=[0.0] * len(row))
    scale = sum(map(bool, row.loss_weights)) / sum(stays) * rows / (rows - 1)
    weights = [weight * scale if stay else 0.0 for weight, stay in zip(row.loss_weights, stays, strict=True)]
    return replace(row, loss_weights=weights)
