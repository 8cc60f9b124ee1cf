"""The whole loss of a step: the same however it is cut, rejected tokens gone, and nothing that breaks on nothing."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
import torch

from nemo_r3.algo.aggregation import token_weights
from nemo_r3.algo.kl import kl
from nemo_r3.algo.losses import loss_named
from nemo_r3.algo.mismatch import correct
from nemo_r3.algo.objective import METRICS, Objective
from nemo_r3.algo.packing import Targets
from nemo_r3.config import AlgoConfig

LIMIT, BETA = 8, 0.3
LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo")
CORRECTIONS = ("none", "tis", "icepop", "sequence_mask")


def float64(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Step:
    """Sequences of random lengths and log-probabilities, as one table: a column per quantity, an entry per token."""

    def __init__(self, seed: int, aggregation: str, sequences: int = 6) -> None:
        draw = random.Random(seed)
        self.lengths = [draw.randint(1, 5) for _ in range(sequences)]
        self.weights = token_weights(self.lengths, aggregation, LIMIT)
        self.advantages = [draw.gauss(0, 1) for _ in self.lengths]
        spread = [draw.choice([0.002, 0.5, 2.0]) for _ in self.lengths]
        self.theirs = [[draw.uniform(-4, -0.1) for _ in range(length)] for length in self.lengths]
        self.ours = [[x + draw.gauss(0, s) for x in row] for row, s in zip(self.theirs, spread, strict=True)]
        self.reference = [[x + draw.gauss(0, 0.5) for x in row] for row in self.ours]

    def microbatch(self, rows: list[int]) -> tuple[torch.Tensor, Targets, torch.Tensor, torch.Tensor]:
        sizes = torch.tensor([self.lengths[row] for row in rows], dtype=torch.int64)
        sequences = torch.arange(len(rows)).repeat_interleave(sizes)
        ours = float64([x for row in rows for x in self.ours[row]]).requires_grad_()
        targets = Targets(
            sources=torch.arange(len(sequences)),
            ids=torch.arange(len(sequences)),
            sequences=sequences,
            advantages=float64([self.advantages[row] for row in rows])[sequences],
            weights=float64([self.weights[row] for row in rows])[sequences],
            rollout_logprobs=float64([x for row in rows for x in self.theirs[row]]),
        )
        reference = float64([x for row in rows for x in self.reference[row]])
        return ours, targets, reference, torch.full((len(sequences),), 2.0, dtype=torch.float64)


def run(objective: Objective, step: Step, microbatches: list[list[int]]) -> tuple[dict[str, float], list[list[float]]]:
    """Metrics and gradients by row, after the actor's last multiplication."""
    total, slopes = torch.zeros(len(METRICS), dtype=torch.float64), {}
    for rows in microbatches:
        ours, *rest = step.microbatch(rows)
        loss, sums = objective(ours, *rest)
        loss.backward()
        slopes |= zip(rows, ours.grad.split([step.lengths[row] for row in rows]), strict=True)
        total += sums
    metrics = dict(zip(METRICS, total.tolist(), strict=True))
    scale = metrics["counted"] / max(metrics["kept"], 1)
    metrics |= {"loss": metrics["loss"] * scale, "kl": metrics["kl"] * scale}
    return metrics, [(slopes[row] * scale).tolist() for row in range(len(step.lengths))]


def from_scratch(algo: AlgoConfig, step: Step) -> tuple[float, float, list[list[float]]]:
    """Loss, KL and gradients of a step that holds the kept tokens alone; nothing of it knows of microbatches."""
    loss = loss_named(algo.loss)
    bounds = {"none": (0, 0), "tis": (0, 2.0), "icepop": (0.5, 5.0), "sequence_mask": (0.99, 1.01)}
    whole = torch.arange(len(step.lengths)).repeat_interleave(torch.tensor(step.lengths))
    ours, theirs, reference = (float64(sum(rows, [])) for rows in (step.ours, step.theirs, step.reference))
    factors, kept = correct(ours - theirs, whole, algo.mismatch_correction, *bounds[algo.mismatch_correction])
    ours.requires_grad_()
    places = torch.arange(len(whole))[kept].tolist()
    rows = sorted({int(whole[place]) for place in places})
    lengths = [sum(int(whole[place]) == row for place in places) for row in rows]
    weights = dict(zip(rows, token_weights(lengths, loss.AGGREGATION, LIMIT), strict=True))
    total, drift = ours.sum() * 0, 0.0
    for row in rows:
        mine = [place for place in places if int(whole[place]) == row]
        new, advantages = ours[mine], torch.full((len(mine),), step.advantages[row], dtype=torch.float64)
        numbers = torch.zeros(len(mine), dtype=torch.int64)
        policy = loss.policy_loss(new, new.detach(), advantages, numbers, loss.CLIP)
        gap = kl(new, reference[mine], "k3")
        total = total + weights[row] * (factors[mine] * policy + BETA * gap).sum()
        drift += weights[row] * gap.sum().item()
    total.backward()
    return total.item(), drift, [slopes.tolist() for slopes in ours.grad.split(step.lengths)]


@pytest.mark.parametrize(("name", "correction"), product(LOSSES, CORRECTIONS))
def test_any_split_is_the_loss_of_the_kept_tokens_alone(name: str, correction: str) -> None:
    algo = AlgoConfig(loss=name, mismatch_correction=correction, kl_beta=BETA)
    objective = Objective(algo)
    for seed in range(4):
        step = Step(seed, loss_named(name).AGGREGATION)
        loss, drift, slopes = from_scratch(algo, step)
        whole, _ = run(objective, step, [[0, 1, 2, 3, 4, 5]])
        for split in ([[0, 1, 2, 3, 4, 5]], [[5], [0], [1], [4], [2], [3]], [[], [3, 1], [0, 2, 5], [4]]):
            metrics, found = run(objective, step, split)
            assert metrics == pytest.approx(whole, rel=1e-9, abs=1e-12)
            assert metrics["loss"] == pytest.approx(loss, rel=1e-9, abs=1e-12)
            assert metrics["kl"] == pytest.approx(drift, rel=1e-9, abs=1e-12)
            for row, expected in zip(found, slopes, strict=True):
                assert row == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_corrections_do_reject_in_these_steps() -> None:
    """Otherwise the tests above would show nothing; some of their microbatches are empty, or rejected as a whole."""
    for correction in ("icepop", "sequence_mask"):
        objective = Objective(AlgoConfig(mismatch_correction=correction))
        found = [run(objective, Step(seed, loss_named("grpo").AGGREGATION), [list(range(6))])[0] for seed in range(4)]
        assert any(0 < metrics["rejected_tokens"] < metrics["trained_tokens"] for metrics in found)
        assert any(0 < metrics["kept"] < metrics["counted"] for metrics in found)


def test_every_metric_by_hand() -> None:
    """Two sequences of GRPO, the second one's second token rejected."""
    ours = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    theirs, reference, entropy = torch.tensor([-1.0, -2.1, -9.0]), torch.tensor([-1.5, -2.0, 0.0]), torch.ones(3)
    shares = torch.tensor([1.0, -1, -1]), torch.tensor([0.5, 0.25, 0.25])  # advantages and weights
    targets = Targets(torch.arange(3), torch.arange(3), torch.tensor([0, 1, 1]), *shares, theirs)
    loss, sums = Objective(AlgoConfig(mismatch_correction="icepop", kl_beta=0.5))(ours, targets, reference, entropy)
    drift = 0.5 * (math.exp(-0.5) - 1 + 0.5)
    expected = {
        "loss": 0.5 * (-1 + math.exp(0.1)) + 0.5 * drift,
        "kl": drift,
        "token_mult_prob_error": 1 + math.exp(0.1) + math.exp(6),
        "rollout_kl": (math.exp(0.1) - 1.1) + (math.exp(6) - 7),
        "importance_ratio": 1 + math.exp(0.1) + math.exp(6),
        "importance_outliers": 1,
        "nonfinite_tokens": 0,
        "entropy": 3,
        "trained_tokens": 3,
        "counted": 2,
        "kept": 2,
        "rejected_tokens": 1,
        "clipped": 0,
    }
    assert dict(zip(METRICS, sums.tolist(), strict=True)) == pytest.approx(expected, rel=1e-5)
    assert sums.dtype == torch.float64 and not sums.requires_grad
    loss.backward()
    slopes = [0.5 * (-1 + 0.5 * (1 - math.exp(-0.5))), 0.5 * math.exp(0.1), 0.0]
    assert ours.grad.tolist() == pytest.approx(slopes, rel=1e-5)


def test_a_later_update_clips_against_the_old_policy_and_corrects_by_it() -> None:
    """GRPO: the second token is clipped, the third goes back, the fourth has no advantage."""
    ours = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    old, advantages, zeros = torch.tensor([-1.1, -1.5, -1.5, -1.5]), torch.tensor([1.0, 1, -1, 0]), torch.zeros(4)
    targets = Targets(
        torch.arange(4), torch.arange(4), torch.arange(4), advantages, torch.full((4,), 0.25), old - math.log(1.5)
    )
    loss, sums = Objective(AlgoConfig(mismatch_correction="tis", kl_beta=0))(ours, targets, None, zeros, old)
    found = dict(zip(METRICS, sums.tolist(), strict=True))
    # the ratio is the actor's against vLLM's, both before the step
    assert (found["clipped"], found["importance_ratio"]) == (1, pytest.approx(4 * 1.5))
    assert loss.item() == pytest.approx(0.25 * 1.5 * (-math.exp(0.1) - 1.2 + math.exp(0.5)))
    loss.backward()
    slopes = [-0.25 * 1.5 * math.exp(0.1), 0.0, 0.25 * 1.5 * math.exp(0.5), 0.0]
    assert ours.grad.tolist() == pytest.approx(slopes)


def test_bounds_are_the_settings_or_the_corrections_own() -> None:
    def rejected(**settings: float) -> float:
        step = Step(3, loss_named("grpo").AGGREGATION)
        step.theirs = [[x - math.log(2) for x in row] for row in step.ours]  # all ratios are 2
        objective = Objective(AlgoConfig(mismatch_correction="icepop", **settings))
        return run(objective, step, [[0, 1, 2, 3, 4, 5]])[0]["rejected_tokens"]

    assert rejected() == rejected(mismatch_low=0.9) == 0
    assert rejected(mismatch_high=1.9) == sum(Step(3, loss_named("grpo").AGGREGATION).lengths)


def test_without_kl_no_reference_is_needed() -> None:
    step = Step(0, loss_named("grpo").AGGREGATION)
    ours, targets, _, entropy = step.microbatch([0, 1])
    loss, sums = Objective(AlgoConfig(kl_beta=0))(ours, targets, None, entropy)
    assert loss.item() == pytest.approx(-(targets.weights * targets.advantages).sum().item())
    assert sums[METRICS.index("kl")] == 0
