"""KL estimators against float64 formulas, and what they promise in expectation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_r3.algo.kl import kl

LOGPROB = st.floats(-12, 0)


@given(LOGPROB, LOGPROB)
def test_estimators_equal_their_formulas(policy: float, reference: float) -> None:
    policy, reference = (float(torch.tensor(value, dtype=torch.float32)) for value in (policy, reference))
    ratio = reference - policy
    expected = {"k2": ratio**2 / 2, "k3": math.exp(ratio) - 1 - ratio}
    for estimator, value in expected.items():
        found = kl(torch.tensor([policy]), torch.tensor([reference]), estimator).item()
        assert found == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_k3_is_exact_and_not_negative_near_zero() -> None:
    policy = torch.full((1000,), -3.0)
    drift = kl(policy, policy + torch.linspace(-1e-3, 1e-3, 1000), "k3")
    assert drift.min() >= 0
    assert drift[0].item() == pytest.approx(5e-7, rel=0.05)  # ratio^2 / 2; exp(x) - 1 - x in float32 gives noise


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(50, generator=draw, dtype=torch.float64).log_softmax(0) for _ in range(2))
    return policy, reference


def test_k3_is_unbiased() -> None:
    policy, reference = distributions()
    exact = (policy.exp() * (policy - reference)).sum()
    expected = (policy.exp() * kl(policy, reference, "k3")).sum()
    assert expected.item() == pytest.approx(exact.item(), rel=1e-12)
    assert exact > 0.5


@pytest.mark.parametrize(("estimator", "direction"), [("k2", "policy || reference"), ("k3", "reference || policy")])
def test_the_gradient_is_that_of_the_kl_one_way_or_the_other(estimator: str, direction: str) -> None:
    _, reference = distributions()
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    policy = logits.log_softmax(0)
    exact = {
        "policy || reference": (policy.exp() * (policy - reference)).sum(),
        "reference || policy": (reference.exp() * (reference - policy)).sum(),
    }
    weights = policy.exp().detach()
    found, *expected = (
        torch.autograd.grad(value, logits, retain_graph=True)[0]
        for value in ((weights * kl(policy, reference, estimator)).sum(), *exact.values())
    )
    for name, gradient in zip(exact, expected, strict=True):
        assert torch.allclose(found, gradient, rtol=1e-10, atol=1e-12) == (name == direction)
