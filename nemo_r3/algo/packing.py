"""Rows -> microbatches: sequences laid end to end, with a group's context only once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress, islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from nemo_r3.algo.layout import Family, Layout
from nemo_r3.algo.targets import Targets
from nemo_r3.types import Row

Value = TypeVar("Value")


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass sees.

    Attributes:
        rows: which rows of the batch it holds, in the order of their targets.
        ids: [tokens] int64 input ids. A row's last token is only ever a target.
        layout: where the sequences lie.
        targets: the tokens that carry loss.
    """

    rows: tuple[int, ...]
    ids: Tensor
    layout: Layout
    targets: Targets

    def to(self, device: torch.device) -> Microbatch:
        """The same on another device."""
        layout = replace(self.layout, positions=self.layout.positions.to(device))
        return replace(self, ids=self.ids.to(device), layout=layout, targets=self.targets.to(device))


def pack(rows: Sequence[Row], pieces: Sequence[Sequence[int]], multiple: int) -> Microbatch:
    """Lays pieces end to end; a last dummy sequence without targets fills up to a multiple of `multiple`.

    Args:
        rows: of the batch.
        pieces: numbers of rows. Rows of one piece share its context: they are of one group. A row on its own is
            laid whole.
        multiple: the number of tokens is one of it, and at least one.
    """
    ids: list[int] = []
    positions: list[int] = []
    cuts, families = [0], []
    sources: list[int] = []

    def lay(tokens: Sequence[int], first: int) -> None:
        if tokens:
            ids.extend(tokens)
            positions.extend(range(first, first + len(tokens)))
            cuts.append(len(ids))

    for piece in pieces:
        start, context = len(ids), rows[piece[0]].shared if len(piece) > 1 else 0
        lay(rows[piece[0]].ids[:context], 0)
        branches = len(ids)
        for number in piece:
            row = rows[number]
            begin = len(ids)
            lay(row.ids[context:-1], context)
            # a token is predicted by the one before it: for a branch's first, the context's last
            after, branch = start - 1, begin - context - 1
            sources += [(after if place <= context else branch) + place for place in trained(row)]
        if len(ids) > branches > start:
            families.append(Family(start, branches, len(ids)))
    padding = max(-len(ids) % multiple, 0 if ids else multiple)
    lay([0] * padding, 0)
    order = [number for piece in pieces for number in piece]
    return Microbatch(
        rows=tuple(order),
        ids=_tensor(ids, len(ids), np.int64),
        layout=Layout(tuple(cuts), tuple(families), _tensor(positions, len(ids), np.int64)),
        targets=_targets([rows[number] for number in order], sources),
    )


def _targets(rows: Sequence[Row], sources: Sequence[int]) -> Targets:
    def of_rows(values: Iterable[Sequence[float]], dtype: type[np.generic]) -> Tensor:
        return _tensor(chain.from_iterable(map(_of_trained, rows, values)), len(sources), dtype)

    numbers = chain.from_iterable(_of_trained(row, [number] * len(row)) for number, row in enumerate(rows))
    return Targets(
        sources=_tensor(sources, len(sources), np.int64),
        ids=of_rows((row.ids for row in rows), np.int64),
        sequences=_tensor(numbers, len(sources), np.int64),
        advantages=of_rows((row.advantages for row in rows), np.float32),
        weights=of_rows((row.weights for row in rows), np.float32),
        rollout_logprobs=of_rows((row.rollout_logprobs for row in rows), np.float32),
    )


def trained(row: Row) -> list[int]:
    """Places of the row's tokens that carry loss; the first token has no predecessor and is never one."""
    return list(_of_trained(row, range(len(row))))


def _tensor(values: Iterable[float], count: int, dtype: type[np.generic]) -> Tensor:
    """[count]; torch's own way of reading a list takes four times as long."""
    return torch.from_numpy(np.fromiter(values, dtype, count))


def _of_trained(row: Row, values: Sequence[Value]) -> Iterator[Value]:
    """Those of the row's values that belong to tokens which carry loss."""
    return islice(compress(values, chain((1,), islice(row.weights, 1, None))), 1, None)
