"""Rows -> microbatches: every row once, within the budget, balanced, and targets never across sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_r3.algo.packing import deal, pack
from nemo_r3.types import Row

BUDGET = 100
LENGTHS = st.lists(st.integers(0, BUDGET), max_size=40)
RANKS = st.integers(1, 5)


def row_of(number: int, length: int) -> Row:
    """A row whose every entry tells its row and place."""
    places = [number * 1000 + place for place in range(length)]
    zeros = [0.0] * length
    return Row(places, (), (), [place + 0.25 for place in places], [place + 0.5 for place in places], zeros)


@given(LENGTHS, RANKS, st.booleans())
def test_every_row_is_dealt_exactly_once_within_the_budget(lengths: list[int], ranks: int, packed: bool) -> None:
    dealt = deal(lengths, ranks, BUDGET, packed)
    assert len(dealt) == ranks
    assert len({len(microbatches) for microbatches in dealt}) == 1, "ranks must run as many microbatches"
    assert sorted(row for rank in dealt for microbatch in rank for row in microbatch) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in microbatch) <= BUDGET for rank in dealt for microbatch in rank)
    assert dealt == deal(lengths, ranks, BUDGET, packed)
    if not packed:
        assert max((len(microbatch) for rank in dealt for microbatch in rank), default=0) <= 1
        assert len(dealt[0]) == max(1, -(-len(lengths) // ranks))


@given(LENGTHS.filter(bool), RANKS)
def test_ranks_carry_about_as_many_tokens(lengths: list[int], ranks: int) -> None:
    dealt = deal(lengths, ranks, BUDGET)
    loads = [sum(lengths[row] for row in microbatch) for rank in dealt for microbatch in rank]
    assert max(loads) - min(loads) <= max(lengths)  # what longest-first onto the lightest promises
    ranked = [sum(lengths[row] for microbatch in rank for row in microbatch) for rank in dealt]
    assert max(ranked) - min(ranked) <= max(lengths) * len(dealt[0])


@given(LENGTHS, RANKS)
def test_few_microbatches_are_wasted(lengths: list[int], ranks: int) -> None:
    count = len(deal(lengths, ranks, BUDGET)[0])
    assert count <= max(1, -(-2 * sum(lengths) // (BUDGET * ranks)) + 1)


def test_short_rows_share_a_microbatch() -> None:
    assert deal([30, 30, 30], 1, BUDGET) == [[[0, 1, 2]]]
    assert deal([30, 30, 30], 1, BUDGET, packed=False) == [[[0], [1], [2]]]


def test_one_row_on_two_ranks_leaves_the_other_an_empty_microbatch() -> None:
    assert sorted(map(str, deal([7], 2, BUDGET))) == ["[[0]]", "[[]]"]
    assert deal([], 2, BUDGET) == [[[]], [[]]]


def test_a_row_beyond_the_budget_is_refused_by_key() -> None:
    with pytest.raises(ValueError, match=r"101 tokens exceeds actor\.microbatch_tokens=100"):
        deal([5, 101], 1, BUDGET)


def test_without_packing_the_budget_does_not_matter() -> None:
    assert deal([5, 101], 1, BUDGET, packed=False) == [[[1], [0]]]


@settings(max_examples=60)
@given(st.lists(st.integers(1, 12), max_size=8), st.sampled_from([1, 2, 4]), st.randoms())
def test_targets_are_the_next_token_of_the_same_sequence(lengths: list[int], multiple: int, random: object) -> None:
    rows = [row_of(number, length) for number, length in enumerate(lengths)]
    chosen = sorted(random.sample(range(len(rows)), k=random.randint(0, len(rows))))  # type: ignore[attr-defined]
    packed = pack(rows, chosen, multiple)
    assert packed.rows == tuple(chosen)
    tokens = sum(lengths[number] - 1 for number in chosen)
    assert len(packed.ids) % multiple == 0 and tokens <= len(packed.ids) < max(tokens, 1) + multiple
    assert packed.bounds[0] == 0 and packed.bounds[-1] == len(packed.ids)
    for index, number in enumerate(chosen):
        part = slice(int(packed.bounds[index]), int(packed.bounds[index + 1]))
        assert packed.ids[part].tolist() == list(rows[number].ids[:-1])
        assert packed.targets[part].tolist() == list(rows[number].ids[1:])
        assert packed.positions[part].tolist() == list(range(lengths[number] - 1))
        assert packed.advantages[part].tolist() == list(rows[number].advantages[1:])
        assert packed.weights[part].tolist() == list(rows[number].weights[1:])
    assert not packed.weights[tokens:].any() and not packed.advantages[tokens:].any(), "padding carries no loss"
    assert packed.longest == max((packed.bounds[1:] - packed.bounds[:-1]).tolist())


def test_what_megatron_reads_has_the_types_it_wants() -> None:
    for chosen in ([], [0], [0, 1]):
        packed = pack([row_of(0, 4), row_of(1, 1)], chosen, 2)
        assert (packed.ids.dtype, packed.positions.dtype, packed.targets.dtype) == (torch.int64,) * 3
        assert packed.bounds.dtype == torch.int32
        assert (packed.advantages.dtype, packed.weights.dtype, packed.rollout_logprobs.dtype) == (torch.float32,) * 3
