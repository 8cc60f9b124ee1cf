"""Dealing rows: each once, within the budget, and so that the slowest rank is not much slower than the mean."""

from __future__ import annotations

import random
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_r3.algo import balance as module
from nemo_r3.algo.balance import Balance, Cost, Dealt, Piece, deal
from nemo_r3.types import Row

BUDGET = 100
TOKENS = Cost(1.0, 0.0, 0.0)
ALL = Cost(10.0, 0.01, 3.0)
GROUPS = st.lists(
    st.tuples(st.integers(0, 60), st.lists(st.integers(1, 41), min_size=1, max_size=8)), min_size=0, max_size=10
)
RANKS = st.integers(1, 6)
STAGES = st.integers(1, 8)


def rows_of(groups: list[tuple[int, list[int]]]) -> list[Row]:
    rows = []
    for group, (context, lengths) in enumerate(groups):
        for length in lengths:
            flat = [0.0] * (context + length)
            weights = [0.0] * context + [1.0] * length
            rows.append(Row([0] * len(flat), (), (), flat, weights, flat, group, context))
    return rows


def piped(balance: Balance, ranks: int, stages: int) -> Dealt:
    """Dealt to a pipeline whose microbatches may be as small as these tests' rows."""
    with patch.object(module, "LEAST_TOKENS", 10):
        return balance.deal(ranks, stages)


def total(balance: Balance, dealt: Dealt) -> int:
    return sum(balance.tokens(piece) for microbatches in dealt for pieces in microbatches for piece in pieces)


def laid(rows: list[Row], piece: Piece) -> int:
    return rows[piece[0]].shared + sum(len(rows[number]) - 1 - rows[number].shared for number in piece)


@settings(max_examples=80)
@given(GROUPS, RANKS, STAGES)
def test_every_row_is_dealt_once_within_the_budget_beside_its_own_group(
    groups: list[tuple[int, list[int]]], ranks: int, stages: int
) -> None:
    rows = rows_of(groups)
    dealt = piped(Balance(rows, ALL, BUDGET), ranks, stages)
    assert len(dealt) == ranks
    assert len({len(microbatches) for microbatches in dealt}) == 1, "ranks must run as many microbatches"
    pieces = [piece for microbatches in dealt for pieces in microbatches for piece in pieces]
    assert sorted(number for piece in pieces for number in piece) == list(range(len(rows)))
    assert all(len({rows[number].group for number in piece}) == 1 for piece in pieces)
    assert all(len(piece) == 1 for piece in pieces if not rows[piece[0]].shared), "nothing to share, nothing shared"
    assert all(
        sum(laid(rows, piece) for piece in pieces) <= BUDGET for microbatches in dealt for pieces in microbatches
    )
    assert dealt == piped(Balance(rows, ALL, BUDGET), ranks, stages)


@given(GROUPS.filter(bool))
def test_flops_of_a_piece_are_counted_token_by_token(groups: list[tuple[int, list[int]]]) -> None:
    rows = rows_of(groups)
    balance = Balance(rows, ALL, BUDGET)
    members = [number for number, row in enumerate(rows) if row.group == 0]
    context, lengths = groups[0]
    if not context:
        members, lengths = members[:1], lengths[:1]
    seen = sum(place + 1 for place in range(context))
    for length in lengths:
        seen += sum(context + place + 1 for place in range(length - 1))
    tokens = context + sum(length - 1 for length in lengths)
    targets = sum(lengths) - (0 if context else 1)  # a row's first token has no predecessor
    assert balance.flops(tuple(members)) == pytest.approx(10 * tokens + 0.01 * seen + 3 * targets)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_slowest_rank_is_within_a_few_percent_of_the_mean(ranks: int) -> None:
    """32 groups as in the paper, contexts of 400 to 1,600 tokens, reflections of 64 to 192."""
    draw = random.Random(3)
    groups = [(draw.randint(400, 1600), [draw.randint(64, 192) for _ in range(8)]) for _ in range(32)]
    balance = Balance(rows_of(groups), Cost(1e3, 1.0, 300.0), 8192)
    dealt = balance.deal(ranks)
    loads = [sum(balance.flops(piece) for pieces in microbatches for piece in pieces) for microbatches in dealt]
    assert max(loads) < 1.03 * sum(loads) / ranks
    assert total(balance, dealt) < 1.02 * sum(context + sum(lengths) - 8 for context, lengths in groups), (
        "contexts are hardly repeated"
    )


def test_a_group_is_cut_where_that_makes_the_slowest_rank_faster() -> None:
    rows = rows_of([(10, [20] * 4)])
    (alone,), (other,) = Balance(rows, TOKENS, BUDGET).deal(2)
    assert [len(piece) for piece in alone + other] == [2, 2]
    one_token_each = rows_of([(90, [1] * 4)])
    assert Balance(one_token_each, TOKENS, BUDGET).deal(2) == [[[(0, 1, 2, 3)]], [[]]], "nothing would get faster"


def test_a_group_beyond_the_budget_repeats_its_context() -> None:
    rows = rows_of([(50, [21] * 5)])
    balance = Balance(rows, TOKENS, BUDGET)
    (microbatches,) = balance.deal(1)
    assert sorted(len(piece) for pieces in microbatches for piece in pieces) == [1, 2, 2]
    assert len(microbatches) == 3
    assert balance.all_flops(TOKENS) == 50 + 5 * 20, "which is no use"


@settings(max_examples=80)
@given(GROUPS, RANKS, STAGES)
def test_a_pipeline_never_takes_longer_than_with_the_fewest_microbatches(
    groups: list[tuple[int, list[int]]], ranks: int, stages: int
) -> None:
    balance = Balance(rows_of(groups), ALL, BUDGET)
    fewest, dealt = balance.deal(ranks), piped(balance, ranks, stages)
    assert balance.time(dealt, stages) <= balance.time(fewest, stages)
    assert balance.time(fewest, 1) == pytest.approx(
        max(sum(balance.flops(piece) for pieces in microbatches for piece in pieces) for microbatches in fewest)
    ), "a pipeline of one stage never waits"


def test_a_pipeline_gets_more_microbatches_of_whole_groups() -> None:
    """16 groups of 1,492 tokens: 5 fit into a microbatch."""
    balance = Balance(rows_of([(500, [125] * 8)] * 16), ALL, 8192)
    assert [len(balance.deal(1, stages)[0]) for stages in (1, 2, 3, 4)] == [4, 8, 11, 11]
    for stages in (1, 2, 4):
        dealt = balance.deal(1, stages)
        assert total(balance, dealt) == 16 * 1492, "no context is repeated"
        (microbatches,) = dealt
        assert 16 * 1492 / len(microbatches) >= module.LEAST_TOKENS


def test_a_pipeline_cuts_a_group_if_that_makes_it_faster() -> None:
    short_context = Balance(rows_of([(100, [1000] * 8)]), TOKENS, 8192)
    assert len(short_context.deal(1)[0]) == 1
    assert len(short_context.deal(1, 4)[0]) == 4
    long_context = Balance(rows_of([(6000, [100] * 8)]), TOKENS, 8192)
    assert long_context.deal(1, 4) == long_context.deal(1) == [[[tuple(range(8))]]]


def test_short_groups_share_a_microbatch() -> None:
    rows = rows_of([(10, [11, 11]), (10, [11, 11])])
    assert Balance(rows, TOKENS, BUDGET).deal(1) == [[[(0, 1), (2, 3)]]]


def test_fewer_rows_than_ranks_leave_empty_microbatches() -> None:
    assert Balance(rows_of([(0, [7])]), TOKENS, BUDGET).deal(2) == [[[(0,)]], [[]]]
    assert Balance([], TOKENS, BUDGET).deal(2) == [[[]], [[]]]


def test_a_row_beyond_the_budget_is_refused_by_key() -> None:
    with pytest.raises(ValueError, match=r"101 tokens exceeds actor\.microbatch_tokens=100"):
        Balance(rows_of([(50, [5, 52])]), TOKENS, BUDGET)


@given(st.lists(st.integers(0, 20), max_size=20), RANKS)
def test_every_item_is_dealt_once(costs: list[int], hands: int) -> None:
    dealt = deal(costs, hands)
    assert len(dealt) == hands
    assert sorted(item for hand in dealt for item in hand) == list(range(len(costs)))


def test_costs_are_balanced() -> None:
    assert deal([5, 1, 1, 3], 2) == [[0], [3, 1, 2]]
    loads = [2 * len(hand) for hand in deal([2] * 11, 3)]
    assert max(loads) - min(loads) <= 2
