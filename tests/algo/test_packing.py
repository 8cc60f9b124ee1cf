"""Rows in microbatches: the context once, and each target predicted from where its own row would predict it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_r3.algo.layout import SharedContext
from nemo_r3.algo.packing import pack
from nemo_r3.types import Row


def row_of(number: int, context: int, own: int, group: int = 0, skip: int = 0) -> Row:
    """A row whose every entry tells its row and place; the first `skip` of its own tokens are not trained."""
    length = context + own
    places = [1000 * (number + 1) + place for place in range(length)]
    ids = [*range(context), *places[context:]]
    weights = [0.0] * (context + skip) + [place + 0.5 for place in places[context + skip :]]
    advantages = [place + 0.25 for place in places]
    logprobs = [-float(place) for place in places]
    return Row(ids, (), (), advantages, weights, logprobs, group, context)


def group_of(context: int, lengths: list[int], group: int, first: int) -> list[Row]:
    return [
        row_of(first + i, context, length, group, skip=i % 2 * min(1, length - 1)) for i, length in enumerate(lengths)
    ]


GROUPS = st.lists(
    st.tuples(st.integers(0, 12), st.lists(st.integers(1, 9), min_size=1, max_size=6)), min_size=0, max_size=4
)


@settings(max_examples=80)
@given(GROUPS, st.sampled_from([1, 2, 4]))
def test_targets_are_predicted_from_their_predecessor_in_the_same_sequence(
    groups: list[tuple[int, list[int]]], multiple: int
) -> None:
    rows: list[Row] = []
    pieces = []
    for group, (context, lengths) in enumerate(groups):
        first = len(rows)
        rows += group_of(context, lengths, group, first)
        numbers = list(range(first, len(rows)))
        pieces += [numbers] if context else [[number] for number in numbers]
    packed = pack(rows, pieces, multiple)
    layout, targets = packed.layout, packed.targets
    laid = sum(rows[piece[0]].shared + sum(len(rows[n]) - 1 - rows[n].shared for n in piece) for piece in pieces)
    assert len(packed.ids) % multiple == 0 and laid <= len(packed.ids) < max(laid, 1) + multiple
    assert len(layout.positions) == len(packed.ids) == layout.cuts[-1] and layout.cuts[0] == 0
    expected = [
        (n, rows[n], place) for n in packed.rows for place in range(1, len(rows[n])) if rows[n].loss_weights[place]
    ]
    assert len(targets) == len(expected)
    for i, (number, row, place) in enumerate(expected):
        assert int(targets.ids[i]) == row.ids[place]
        assert int(packed.ids[targets.sources[i]]) == row.ids[place - 1]
        assert int(layout.positions[targets.sources[i]]) == place - 1
        assert packed.rows[int(targets.sequences[i])] == number
        assert targets.advantages[i] == row.advantages[place] and targets.weights[i] == row.loss_weights[place]
        assert targets.rollout_logprobs[i] == row.rollout_logprobs[place]


def test_a_group_lays_its_context_once() -> None:
    rows = group_of(5, [3, 1, 4], 0, 0)
    packed = pack(rows, [[0, 1, 2]], 1)
    assert packed.ids.tolist() == [0, 1, 2, 3, 4, 1005, 1006, 3005, 3006, 3007]  # the last tokens are only targets
    assert packed.layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7]
    assert packed.layout.cuts == (0, 5, 7, 10)
    assert packed.layout.shared == (SharedContext(5, 5),)
    assert (packed.layout.context_tokens, packed.layout.branch_tokens) == (slice(0, 5), slice(5, 10))
    assert (packed.layout.branches.cuts, packed.layout.contexts.cuts) == ((0, 5), (0, 5))
    # the context's last token predicts the first token of rows 0 and 2; row 1's only token is not left out either
    assert packed.targets.sources.tolist() == [4, 5, 6, 4, 4, 7, 8, 9]
    assert packed.targets.sequences.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]


def test_contexts_lie_before_branches_and_branches_before_whole_rows() -> None:
    rows = [*group_of(3, [2, 3], 0, 0), *group_of(5, [4], 1, 2), *group_of(2, [3, 2], 2, 3)]
    packed = pack(rows, [[0, 1], [2], [3, 4]], 1)
    layout, places = packed.layout, packed.ids.tolist()
    assert layout.shared == (SharedContext(3, 3), SharedContext(2, 3)) and layout.cuts == (0, 3, 5, 6, 8, 10, 11, 19)
    assert places[layout.context_tokens] == [0, 1, 2, 0, 1]
    assert places[layout.branch_tokens] == [1003, 2003, 2004, 4002, 4003, 5002]
    assert places[11:] == [0, 1, 2, 3, 4, 3005, 3006, 3007]
    assert (layout.contexts.cuts, layout.branches.cuts) == ((0, 3, 5), (0, 3, 6))
    assert packed.rows == (0, 1, 2, 3, 4), "targets keep the order of the pieces"


def test_every_token_but_the_dummies_keeps_its_experts() -> None:
    """Of two layers and an expert each: the low bytes of the token's id."""
    rows = [*group_of(3, [2, 3], 0, 0), *group_of(5, [4], 1, 2), *group_of(2, [1, 1], 2, 3)]
    ids = [np.array(row.ids[:-1], dtype=np.uint16)[:, None, None].repeat(2, 1) for row in rows]
    rows = [replace(row, routed_experts=(each[:2], each[2:])) for row, each in zip(rows, ids, strict=True)]
    packed = pack(rows, [[0, 1], [2], [3, 4]], 16)
    assert packed.routed_experts is not None and packed.routed_experts.dtype == torch.uint16
    laid = packed.routed_experts.tolist()
    assert laid == [[[token]] * 2 for token in packed.ids.tolist()[: len(laid)]]
    assert len(laid) == 3 + 1 + 2 + 8 + 2 and len(packed.ids) == 16
    assert pack(rows, [], 2).routed_experts is None


def test_a_row_on_its_own_is_laid_whole() -> None:
    packed = pack(group_of(5, [3, 1, 4], 0, 0), [[0]], 1)
    assert packed.layout.shared == () and packed.layout.cuts == (0, 7)
    assert packed.layout.positions.tolist() == list(range(7))


def test_one_token_reflections_share_a_context_that_nothing_follows() -> None:
    packed = pack(group_of(4, [1, 1], 0, 0), [[0, 1]], 1)
    assert packed.layout.shared == () and packed.layout.cuts == (0, 4)
    assert packed.targets.sources.tolist() == [3, 3] and packed.targets.ids.tolist() == [1004, 2004]


def test_nothing_at_all_is_a_dummy_sequence_without_targets() -> None:
    packed = pack([], [], 2)
    assert packed.ids.tolist() == [0, 0] and len(packed.targets) == 0 and packed.rows == ()


def test_tensors_have_the_types_that_their_readers_want() -> None:
    for pieces in ([], [[0]], [[0, 1]]):
        packed = pack(group_of(3, [4, 2], 0, 0), pieces, 2).to(torch.device("cpu"))
        targets = packed.targets
        assert {t.dtype for t in (packed.ids, packed.layout.positions, targets.sources, targets.ids)} == {torch.int64}
        assert packed.layout.parts.tensor.dtype == torch.int32 and targets.sequences.dtype == torch.int64
        assert {t.dtype for t in (targets.advantages, targets.weights, targets.rollout_logprobs)} == {torch.float32}
