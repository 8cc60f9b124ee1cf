"""Rows -> microbatches: sequences laid end to end, with a group's context only once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_r3.algo.layout import Family, Layout
from nemo_r3.algo.targets import Targets
from nemo_r3.types import Row


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
            sources += [(start if place <= context else begin - context) + place - 1 for place in trained(row)]
        if len(ids) > branches > start:
            families.append(Family(start, branches, len(ids)))
    padding = max(-len(ids) % multiple, 0 if ids else multiple)
    lay([0] * padding, 0)
    order = [number for piece in pieces for number in piece]
    return Microbatch(
        rows=tuple(order),
        ids=torch.tensor(ids),
        layout=Layout(tuple(cuts), tuple(families), torch.tensor(positions)),
        targets=_targets([rows[number] for number in order], sources),
    )


def _targets(rows: Sequence[Row], sources: Sequence[int]) -> Targets:
    places = [(number, row, target) for number, row in enumerate(rows) for target in trained(row)]

    def whole(values: Iterator[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64)

    def real(values: Iterator[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32)

    return Targets(
        sources=whole(iter(sources)),
        ids=whole(row.ids[target] for _, row, target in places),
        sequences=whole(number for number, _, _ in places),
        advantages=real(row.advantages[target] for _, row, target in places),
        weights=real(row.weights[target] for _, row, target in places),
        rollout_logprobs=real(row.rollout_logprobs[target] for _, row, target in places),
    )


def trained(row: Row) -> list[int]:
    """Places of the row's tokens that carry loss; the first token has no predecessor and is never one."""
    return [place for place in range(1, len(row)) if row.weights[place]]
