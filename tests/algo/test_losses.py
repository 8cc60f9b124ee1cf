"""Every loss, weighted and summed, against its paper's equation in plain Python, and its gradient against differences.

A step is a list of sequences (advantage, [(new, old), ...]) of log-probabilities. A paper's function is also given the
new log-probabilities once more, `frozen`, where the equation has a stop-gradient.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch

from nemo_r3.algo.aggregation import token_weights
from nemo_r3.algo.losses import loss_named
from nemo_r3.config import AlgoConfig

Sequence = tuple[float, list[tuple[float, float]]]
LIMIT = 7
LOSSES = AlgoConfig.__dataclass_fields__["loss"].metadata["choices"]


def surrogate(ratio: float, advantage: float, low: float, high: float) -> float:
    clipped = low if ratio < low else high if ratio > high else ratio
    return min(ratio * advantage, clipped * advantage)


def grpo(step: list[Sequence], frozen: list[list[float]]) -> float:
    total = 0.0
    for advantage, tokens in step:
        total += sum(surrogate(math.exp(new - old), advantage, 0.8, 1.2) for new, old in tokens) / len(tokens)
    return -total / len(step)


def dr_grpo(step: list[Sequence], frozen: list[list[float]]) -> float:
    total = 0.0
    for advantage, tokens in step:
        total += sum(surrogate(math.exp(new - old), advantage, 0.8, 1.2) for new, old in tokens) / LIMIT
    return -total / len(step)


def dapo(step: list[Sequence], frozen: list[list[float]]) -> float:
    total, count = 0.0, 0
    for advantage, tokens in step:
        total += sum(surrogate(math.exp(new - old), advantage, 0.8, 1.28) for new, old in tokens)
        count += len(tokens)
    return -total / count


def gspo(step: list[Sequence], frozen: list[list[float]]) -> float:
    total = 0.0
    for advantage, tokens in step:
        ratio = math.exp(sum(new - old for new, old in tokens) / len(tokens))
        total += surrogate(ratio, advantage, 1 - 3e-4, 1 + 4e-4)
    return -total / len(step)


def cispo(step: list[Sequence], frozen: list[list[float]]) -> float:
    total, count = 0.0, 0
    for (advantage, tokens), stopped in zip(step, frozen, strict=True):
        for (new, old), still in zip(tokens, stopped, strict=True):
            total += min(math.exp(still - old), 5.0) * advantage * new
            count += 1
    return -total / count


def rloo(step: list[Sequence], frozen: list[list[float]]) -> float:
    return -sum(advantage * sum(new for new, _ in tokens) for advantage, tokens in step) / len(step)


PAPERS: dict[str, Callable[[list[Sequence], list[list[float]]], float]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "rloo": rloo,
}


def drawn(seed: int) -> list[Sequence]:
    """Sequences whose ratios stray little (as GSPO's clip is about), some, or much."""
    draw = random.Random(seed)
    step = []
    for scale in [3e-4, 0.02, 0.3, 2.0] * 3:
        old = [draw.uniform(-4, -0.1) for _ in range(draw.randint(1, LIMIT))]
        step.append((draw.gauss(0, 1), [(value + draw.gauss(0, scale), value) for value in old]))
    return step


def news(step: list[Sequence]) -> list[list[float]]:
    return [[new for new, _ in tokens] for _, tokens in step]


def difference(step: list[Sequence], paper: Callable[..., float], number: int, token: int, eps: float = 1e-6) -> float:
    """The derivative of the paper's loss by one log-probability, from two sides."""
    ends = []
    for shift in (eps, -eps):
        advantage, tokens = step[number]
        moved = [(new + shift * (place == token), old) for place, (new, old) in enumerate(tokens)]
        ends.append(paper([*step[:number], (advantage, moved), *step[number + 1 :]], news(step)))
    return (ends[0] - ends[1]) / (2 * eps)


def test_every_choice_has_a_paper() -> None:
    assert set(LOSSES) == set(PAPERS)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PAPERS)
def test_value_and_gradient_are_the_papers(name: str, seed: int) -> None:
    step, loss = drawn(seed), loss_named(name)
    lengths = [len(tokens) for _, tokens in step]
    new = torch.tensor(sum(news(step), []), dtype=torch.float64, requires_grad=True)
    old = torch.tensor([old for _, tokens in step for _, old in tokens], dtype=torch.float64)
    sequences = torch.arange(len(step)).repeat_interleave(torch.tensor(lengths))
    advantages = torch.tensor([advantage for advantage, _ in step], dtype=torch.float64)[sequences]
    weights = torch.tensor(token_weights(lengths, loss.AGGREGATION, LIMIT), dtype=torch.float64)[sequences]

    total = (weights * loss.policy_loss(new, old, advantages, sequences, loss.CLIP)).sum()
    total.backward()

    assert total.item() == pytest.approx(PAPERS[name](step, news(step)), rel=1e-12)
    places = [(number, token) for number, length in enumerate(lengths) for token in range(length)]
    slopes = [difference(step, PAPERS[name], *place) for place in places]
    assert new.grad.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", PAPERS)
def test_on_policy_every_loss_is_the_policy_gradient(name: str) -> None:
    loss = loss_named(name)
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([0.5, 0.5, -2.0])
    sequences = torch.tensor([0, 0, 1])
    loss.policy_loss(logprobs, logprobs.detach(), advantages, sequences, loss.CLIP).sum().backward()
    assert logprobs.grad.tolist() == (-advantages).tolist()
