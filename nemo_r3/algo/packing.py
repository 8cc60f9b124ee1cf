"""Rows -> microbatches: a microbatch is a token budget filled with whole sequences, not a number of padded rows."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_r3.types import Row


@dataclass(frozen=True)
class Microbatch:
    """Sequences laid end to end, shifted so that entry t predicts `targets[t]`.

    Attributes:
        rows: which rows of the batch it holds, in order.
        ids: [tokens] int64 input ids (a row's last token is only ever a target).
        positions: [tokens] int64, from 0 in each sequence.
        bounds: [sequences + 1] int32, where each sequence begins and the last one ends (padding included).
        longest: length of its longest sequence.
        targets: [tokens] int64.
        advantages: [tokens] float32.
        weights: [tokens] float32, the target's share of the step's loss.
        rollout_logprobs: [tokens] float32.
    """

    rows: tuple[int, ...]
    ids: Tensor
    positions: Tensor
    bounds: Tensor
    longest: int
    targets: Tensor
    advantages: Tensor
    weights: Tensor
    rollout_logprobs: Tensor

    def to(self, device: torch.device) -> Microbatch:
        """The same on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Microbatch(rows=self.rows, longest=self.longest, **moved)


def deal(lengths: Sequence[int], ranks: int, budget: int, packed: bool = True) -> list[list[list[int]]]:
    """Deals rows to data-parallel ranks and microbatches, longest first onto the lightest.

    Args:
        lengths: tokens of each row.
        ranks: data-parallel ranks.
        budget: tokens a packed microbatch may hold.
        packed: False gives every row a microbatch of its own, however long.

    Returns:
        [ranks][microbatches] lists of row indices; every rank has the same number of microbatches, some maybe
        empty. The same on every rank, since it depends on the arguments alone.

    Raises:
        ValueError: a row is longer than the budget.
    """
    if not packed:
        budget = max(lengths, default=0)
    elif lengths and max(lengths) > budget:
        raise ValueError(f"a row of {max(lengths)} tokens exceeds actor.microbatch_tokens={budget}")
    most = max(1, -(-len(lengths) // ranks))
    count = max(1, -(-sum(lengths) // (budget * ranks))) if packed else most
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    while (bins := _fill(order, lengths, count * ranks, budget, 1 if not packed else len(lengths))) is None:
        count += 1
    return [[sorted(rows) for rows in bins[rank::ranks]] for rank in range(ranks)]


def _fill(
    order: Sequence[int], lengths: Sequence[int], count: int, budget: int, most_rows: int
) -> list[list[int]] | None:
    """Longest-first onto the lightest of `count` bins; None if one would overflow."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, 0, number) for number in range(count)]  # tokens, rows: an empty row takes its place too
    for row in order:
        load, _, number = heapq.heappop(loads)
        if load + lengths[row] > budget or len(bins[number]) >= most_rows:
            return None
        bins[number].append(row)
        heapq.heappush(loads, (load + lengths[row], len(bins[number]), number))
    return bins


def pack(rows: Sequence[Row], chosen: Sequence[int], multiple: int) -> Microbatch:
    """Lays the chosen rows end to end; a last dummy sequence without weight fills up to a multiple of `multiple`."""
    ids: list[int] = []
    positions: list[int] = []
    columns: list[list[float]] = [[], [], [], []]  # targets, advantages, weights, rollout_logprobs
    bounds = [0]
    for number in chosen:
        row = rows[number]
        ids += row.ids[:-1]
        positions += range(len(row) - 1)
        for column, values in zip(columns, (row.ids, row.advantages, row.weights, row.rollout_logprobs), strict=True):
            column += values[1:]
        bounds.append(len(ids))
    padding = max(-len(ids) % multiple, 0 if ids else multiple)
    if padding:
        ids += [0] * padding
        positions += range(padding)
        for column in columns:
            column += [0] * padding
        bounds.append(len(ids))
    targets, advantages, weights, rollout_logprobs = columns
    return Microbatch(
        rows=tuple(chosen),
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        bounds=torch.tensor(bounds, dtype=torch.int32),
        longest=max(end - start for start, end in zip(bounds, bounds[1:], strict=False)),
        targets=torch.tensor(targets, dtype=torch.int64),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        weights=torch.tensor(weights, dtype=torch.float32),
        rollout_logprobs=torch.tensor(rollout_logprobs, dtype=torch.float32),
    )
