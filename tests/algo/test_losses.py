"""GRPO's loss and the mismatch correction against the formulas, token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_r3.algo.losses.grpo import policy_loss
from nemo_r3.algo.mismatch import importance_weights, prob_error
from nemo_r3.config import AlgoConfig

LOGPROB = st.floats(-6, 0, width=32)
TOKENS = st.lists(st.tuples(LOGPROB, LOGPROB, st.floats(-3, 3, width=32)), min_size=1, max_size=12)


def obvious_loss(new: float, old: float, advantage: float, low: float, high: float) -> float:
    ratio = math.exp(new - old)
    if ratio < 1 - low:
        clipped = 1 - low
    elif ratio > 1 + high:
        clipped = 1 + high
    else:
        clipped = ratio
    return -min(ratio * advantage, clipped * advantage)


@given(TOKENS, st.floats(0.05, 0.5), st.floats(0.05, 0.5))
def test_grpo_equals_the_formula(tokens: list[tuple[float, float, float]], low: float, high: float) -> None:
    new, old, advantages = (torch.tensor(column) for column in zip(*tokens, strict=True))
    found = policy_loss(new, old, advantages, AlgoConfig(clip_low=low, clip_high=high))
    expected = [obvious_loss(*token, low, high) for token in tokens]
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("shift", "advantage", "flows"),
    [(0.0, 1.0, True), (0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False)],
)
def test_clipping_stops_the_gradient_only_where_the_ratio_has_gone_far_enough(
    shift: float, advantage: float, flows: bool
) -> None:
    old = torch.tensor([-2.0])
    new = (old + shift).requires_grad_()
    policy_loss(new, old, torch.tensor([advantage]), AlgoConfig()).sum().backward()
    assert (new.grad != 0).item() is flows
    if flows:  # d/dlogp of -ratio * A
        assert new.grad.item() == pytest.approx(-math.exp(shift) * advantage, rel=1e-6)


def test_at_ratio_one_the_gradient_is_the_policy_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([0.5, -1.0, 2.0])
    loss = policy_loss(logprobs, logprobs.detach(), advantages, AlgoConfig())
    loss.sum().backward()
    assert loss.tolist() == (-advantages).tolist()
    assert logprobs.grad.tolist() == (-advantages).tolist()


@given(st.lists(st.tuples(LOGPROB, LOGPROB), min_size=1, max_size=12), st.floats(1.1, 5))
def test_mismatch_equals_the_formula(tokens: list[tuple[float, float]], cap: float) -> None:
    ours, theirs = (torch.tensor(column) for column in zip(*tokens, strict=True))
    error = [math.exp(abs(a - b)) for a, b in tokens]
    assert prob_error(ours, theirs).tolist() == pytest.approx(error, rel=1e-4)
    config = AlgoConfig(mismatch_correction="tis", mismatch_cap=cap)
    truncated = [min(math.exp(a - b), cap) for a, b in tokens]
    assert importance_weights(ours, theirs, config).tolist() == pytest.approx(truncated, rel=1e-4)
    assert importance_weights(ours, theirs, AlgoConfig()).tolist() == [1.0] * len(tokens)


def test_importance_weights_carry_no_gradient() -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)
    assert not importance_weights(logprobs, torch.tensor([-2.0]), AlgoConfig(mismatch_correction="tis")).requires_grad
