"""The corrections for the gap between vLLM and the actor, token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_r3.algo.aggregation import Kept
from nemo_r3.algo.mismatch import correct, prob_error
from nemo_r3.config import AlgoConfig

LOGPROB = st.floats(-6, 0)
STEPS = st.lists(st.lists(st.tuples(LOGPROB, LOGPROB), min_size=1, max_size=5), min_size=1, max_size=4)
KINDS = AlgoConfig.__dataclass_fields__["mismatch_correction"].metadata["choices"]


def obvious(step: list[list[tuple[float, float]]], kind: str, low: float, high: float) -> tuple[list, list]:
    factors, kept = [], []
    for sequence in step:
        ratios = [math.exp(ours - theirs) for ours, theirs in sequence]
        middle = math.exp(sum(ours - theirs for ours, theirs in sequence) / len(sequence))
        for ratio in ratios:
            factors.append({"none": 1.0, "tis": min(ratio, high)}.get(kind, ratio))
            kept.append({"icepop": low <= ratio <= high, "sequence_mask": low <= middle <= high}.get(kind, True))
    return factors, kept


def mask(kept: Kept, count: int) -> list[bool]:
    found = torch.zeros(count, dtype=torch.bool)
    found[kept] = True
    return found.tolist()


@given(STEPS, st.sampled_from(KINDS), st.floats(0.2, 0.99), st.floats(1.01, 5))
def test_corrections_equal_the_formula(
    step: list[list[tuple[float, float]]], kind: str, low: float, high: float
) -> None:
    ours, theirs = torch.tensor(sum(step, []), dtype=torch.float64).unbind(1)
    log_ratio = ours - theirs
    sequences = torch.arange(len(step)).repeat_interleave(torch.tensor([len(sequence) for sequence in step]))
    factors, kept = correct(log_ratio, sequences, kind, low, high)
    expected_factors, expected_kept = obvious(step, kind, low, high)
    assert factors.tolist() == pytest.approx(expected_factors, rel=1e-12)
    assert mask(kept, len(ours)) == expected_kept
    assert prob_error(log_ratio).tolist() == pytest.approx([math.exp(abs(a - b)) for a, b in sum(step, [])])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_overflows(kind: str) -> None:
    log_ratio = torch.tensor([899.0, -899.0, math.inf])
    factors, kept = correct(log_ratio, torch.arange(3), kind, 0.5, 2.0)
    assert factors.isfinite().all()
    assert mask(kept, 3) == [kind in ("none", "tis")] * 3
    assert prob_error(log_ratio).isfinite().all()


@pytest.mark.parametrize("kind", ["icepop", "sequence_mask"])
def test_nan_is_kept_so_that_it_stops_the_step(kind: str) -> None:
    factors, kept = correct(torch.tensor([math.nan]), torch.tensor([0]), kind, 0.5, 2.0)
    assert factors.isnan().all() and mask(kept, 1) == [True]
