"""Rows -> microbatches: sequences packed end to end, a group's context only once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemo_r3.algo.layout import Layout, SharedContext
from nemo_r3.types import Row

Value = TypeVar("Value")


@dataclass(frozen=True)
class Targets:
    """The trained tokens of a microbatch, sequence after sequence."""

    sources: Tensor
    """[trained] int64, place in the microbatch of the hidden state that predicts the token; the same for the first
    tokens of all reflections of a group."""
    ids: Tensor  # [trained] int64, the tokens
    sequences: Tensor
    """[trained] int64, which sequence of the microbatch each belongs to: from 0, never decreasing. A sequence is never
    split over microbatches."""
    advantages: Tensor  # [trained] float32
    weights: Tensor  # [trained] float32, the token's share in its update's loss, never 0
    rollout_logprobs: Tensor  # [trained] float32, vLLM's log-probabilities (nats)

    def to(self, device: torch.device) -> Targets:
        """The same on another device."""
        return Targets(**{name: value.to(device) for name, value in vars(self).items()})

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass sees."""

    rows: tuple[int, ...]  # which rows of the batch it holds, in the order of their targets
    ids: Tensor  # [tokens] int64 input ids; a row's last token is only ever a target
    layout: Layout
    targets: Targets
    routed_experts: Tensor | None = None
    """[tokens, layers, top_k] uint8 or uint16: to which experts vLLM sent them, but for the dummy tokens at the end;
    None: the model decides."""

    def to(self, device: torch.device) -> Microbatch:
        """The same on another device."""
        layout = replace(self.layout, positions=self.layout.positions.to(device))
        routed = None if self.routed_experts is None else self.routed_experts.to(device)
        return replace(
            self, ids=self.ids.to(device), layout=layout, targets=self.targets.to(device), routed_experts=routed
        )


def pack(rows: Sequence[Row], pieces: Sequence[Sequence[int]], multiple: int) -> Microbatch:
    """Packs pieces as `Layout` shows; a last dummy sequence without targets pads to a multiple of `multiple`.

    Args:
        rows: of the batch.
        pieces: numbers of rows. The rows of a piece are of one group and share its context; a row on its own is a whole
            sequence.
        multiple: the token count is padded to a positive multiple of this.
    """
    ids: list[int] = []
    positions: list[int] = []
    cuts = [0]
    routed: list[NDArray[Any]] = []
    sources: dict[int, list[int]] = {}

    def add(tokens: Sequence[int], first_position: int = 0) -> range:
        """Adds a part, unless it is empty; returns the places of its tokens."""
        start = len(ids)
        if tokens:
            ids.extend(tokens)
            positions.extend(range(first_position, first_position + len(tokens)))
            cuts.append(len(ids))
        return range(start, len(ids))

    def add_part(row: Row, start: int, end: int) -> range:
        """Adds a row's tokens from `start` to `end`, and their experts."""
        if row.routed_experts:
            routed.append(np.concatenate(row.routed_experts)[start:end])
        return add(row.ids[start:end], start)

    def add_rows(piece: Sequence[int], context: range) -> None:
        """Adds what the rows have of their own, after the context that lies at these places."""
        for number in piece:
            own = add_part(rows[number], len(context), len(rows[number]) - 1)
            # a row's input is all tokens but the last, and each predicts the one after it
            sources[number] = list(compress([*context, *own], rows[number].loss_weights[1:]))

    shared: list[tuple[SharedContext, Sequence[int]]] = []
    alone: list[tuple[int, Sequence[int]]] = []
    for piece in pieces:
        context = rows[piece[0]].shared if len(piece) > 1 else 0
        branches = sum(len(rows[number]) - 1 - context for number in piece)
        if context and branches:
            shared.append((SharedContext(context, branches), piece))
        else:
            alone.append((context, piece))
    contexts = [add_part(rows[piece[0]], 0, lengths.context) for lengths, piece in shared]
    for places, (_, piece) in zip(contexts, shared, strict=True):
        add_rows(piece, places)
    for context, piece in alone:
        add_rows(piece, add_part(rows[piece[0]], 0, context))
    add([0] * (-len(ids) % multiple if ids else multiple))
    order = [number for piece in pieces for number in piece]
    return Microbatch(
        rows=tuple(order),
        ids=_tensor(ids, len(ids), np.int64),
        layout=Layout(tuple(cuts), tuple(lengths for lengths, _ in shared), _tensor(positions, len(ids), np.int64)),
        targets=_targets([rows[number] for number in order], [place for number in order for place in sources[number]]),
        routed_experts=torch.from_numpy(np.concatenate(routed)).clone() if routed else None,
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
        weights=of_rows((row.loss_weights for row in rows), np.float32),
        rollout_logprobs=of_rows((row.rollout_logprobs for row in rows), np.float32),
    )


def _tensor(values: Iterable[float], count: int, dtype: type[np.generic]) -> Tensor:
    """[count]; four times as fast as torch's own way of reading a list.

    Cloned, because a thread of autograd or gloo may free it at exit, and freeing a numpy buffer needs Python's lock.
    """
    return torch.from_numpy(np.fromiter(values, dtype, count)).clone()


def _of_trained(row: Row, values: Sequence[Value]) -> Iterator[Value]:
    """The values of the row's tokens that carry loss."""
    return compress(values[1:], row.loss_weights[1:])
