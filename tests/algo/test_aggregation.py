"""How tokens share a loss, by hand, and rejection against a step that never had the rejected tokens."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_r3.algo.aggregation import EVERY, Aggregation, denominators, kept_weights, sequence_means, token_weights

LIMIT = 10
STEPS = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=6)  # kept tokens of sequences


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Aggregation.SEQUENCE_MEAN, [1 / 2, 1 / 6]),
        (Aggregation.TOKEN_MEAN, [1 / 4, 1 / 4]),
        (Aggregation.SEQUENCE_SUM, [1 / 2, 1 / 2]),
        (Aggregation.LIMIT_MEAN, [1 / 20, 1 / 20]),
    ],
)
def test_a_sequence_of_one_token_and_one_of_three(kind: Aggregation, expected: list[float]) -> None:
    assert token_weights([1, 3], kind, LIMIT) == pytest.approx(expected, rel=1e-15)
    assert token_weights([], kind, LIMIT) == []


@given(STEPS, st.sampled_from(Aggregation), st.data())
def test_rejected_tokens_leave_loss_and_denominators(
    step: list[list[bool]], kind: Aggregation, data: st.DataObject
) -> None:
    """Cut into microbatches anywhere between sequences, the kept tokens' weights are those of a step of them alone."""
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(step)), max_size=3))), len(step)]
    lengths = [len(sequence) for sequence in step]
    weights = token_weights(lengths, kind, LIMIT)
    found, counted, left = [], 0, 0
    for start, end in zip(cuts, cuts[1:], strict=False):
        sizes = torch.tensor(lengths[start:end], dtype=torch.int64)
        sequences = torch.arange(end - start).repeat_interleave(sizes)
        kept = torch.tensor(sum(step[start:end], []), dtype=torch.bool)
        own = torch.tensor(weights[start:end], dtype=torch.float64)[sequences]
        found += kept_weights(own, kept, sequences, kind).tolist()
        before, after = denominators(kept, sequences, kind)
        counted, left = counted + int(before), left + int(after)
    remaining = [sum(sequence) for sequence in step if any(sequence)]
    alone = token_weights(remaining, kind, LIMIT)
    expected = [weight for weight, length in zip(alone, remaining, strict=True) for _ in range(length)]
    assert [weight * counted / max(left, 1) for weight in found] == pytest.approx(expected, rel=1e-12)


@given(STEPS)
def test_nothing_rejected_changes_nothing(step: list[list[bool]]) -> None:
    sequences = torch.arange(len(step)).repeat_interleave(torch.tensor([len(sequence) for sequence in step]))
    weights = torch.rand(len(sequences))
    for kind, kept in product(Aggregation, (torch.ones(len(sequences), dtype=torch.bool), EVERY)):
        assert torch.equal(kept_weights(weights, kept, sequences, kind), weights)
        before, after = denominators(kept, sequences, kind)
        assert before == after == (len(sequences) if kind == Aggregation.TOKEN_MEAN else len(step))


def test_means_of_sequences_that_are_not_numbered_in_a_row() -> None:
    values = torch.tensor([1.0, 2.0, 6.0, -4.0], dtype=torch.float64, requires_grad=True)
    means = sequence_means(values, torch.tensor([2, 5, 5, 9]))
    assert means.tolist() == [1.0, 4.0, 4.0, -4.0]
    (means * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert values.grad.tolist() == [1.0, 55.0, 55.0, 1000.0]
