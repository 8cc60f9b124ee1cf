"""Deals rows to data-parallel ranks and their microbatches, so that all ranks compute for about as long.

1. Each group is cut into pieces within the token budget. A piece is some rows of a group, which share its context.
2. Pieces go to ranks: the costliest piece first, to the rank with the least to do; then rows move from the slowest rank
   to the fastest while that helps. Moving only some rows of a piece repeats its context.
3. A rank's pieces go to its microbatches the same way; all ranks have equally many.

Without a pipeline, the fewest microbatches are best. A pipeline idles while it fills and drains, so several ways are
tried, from few large microbatches to many small ones, and the fastest is taken.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_r3.types import Row

Piece = tuple[int, ...]
"""Numbers of rows that share one context."""

Dealt = list[list[list[Piece]]]
"""Pieces by [rank][microbatch]; all ranks have equally many microbatches, some of which may be empty."""

MICROBATCHES_PER_STAGE = 4
"""With this many microbatches per stage, a pipeline is idle for less than a fifth of the time."""

LEAST_TOKENS = 2048
"""Mean tokens that a microbatch must have for more of them to be tried; fewer are too little work for a GPU."""

CUTS = (1, 2, 4, 8)
"""In a pipeline, budgets divided by each of these are tried; smaller pieces repeat contexts more often."""


@dataclass(frozen=True)
class Cost:
    """FLOPs of a pass over a model, by what causes them."""

    per_token: float  # of an input token in the layers' matrices
    per_pair: float  # of a pair of a query token and a key token that it attends to, in all layers
    per_target: float  # of a trained token in the head

    def flops(self, shared: int, own: Sequence[int], targets: int) -> float:
        """FLOPs on a context of `shared` tokens with branches of `own` tokens each, `targets` of all these trained."""
        pairs = shared * (shared + 1) / 2 + sum(length * shared + length * (length + 1) / 2 for length in own)
        return self.per_token * (shared + sum(own)) + self.per_pair * pairs + self.per_target * targets


@dataclass(frozen=True)
class _Measured:
    """How many of a row's tokens are shared with its group, its own, and trained."""

    shared: int
    own: int
    targets: int


class Balance:
    """Deals rows; depends on nothing but its arguments, so every rank gets the same.

    Example: ``Balance(rows, Cost(2, 0, 0), budget=8192).deal(ranks=4)``
    """

    def __init__(self, rows: Sequence[Row], cost: Cost, budget: int) -> None:
        """Measures the rows.

        Args:
            rows: the rows of a group are adjacent and share their context, unless their `shared` is 0.
            cost: what is balanced.
            budget: tokens that a microbatch may hold.

        Raises:
            ValueError: a row alone is longer than the budget.
        """
        self._rows = [_Measured(row.shared, len(row) - 1 - row.shared, row.trained) for row in rows]
        self._cost, self._budget = cost, budget
        longest = max((row.shared + row.own for row in self._rows), default=0)
        if longest > budget:
            raise ValueError(f"a row of {longest} tokens exceeds actor.microbatch_tokens={budget}")
        groups: dict[object, list[int]] = {}
        for number, row in enumerate(rows):
            groups.setdefault(row.group if row.shared else (number,), []).append(number)
        self._groups = list(groups.values())

    def deal(self, ranks: int, stages: int = 1) -> Dealt:
        """Deals the rows to data-parallel ranks, each of which is a pipeline of `stages`."""
        fewest = self._deal(self._budget, ranks, wanted=1)
        wanted = MICROBATCHES_PER_STAGE * stages
        if stages == 1 or len(fewest[0]) >= wanted:
            return fewest
        smaller = (self._deal(self._budget // parts, ranks, wanted) for parts in CUTS)
        return min((fewest, *smaller), key=lambda dealt: self.time(dealt, stages))

    def time(self, dealt: Dealt, stages: int) -> float:
        """The slowest rank's time, in FLOPs: all its microbatches through one stage, the longest through the others."""
        costs = [[sum(map(self.flops, pieces)) for pieces in microbatches] for microbatches in dealt]
        return max(sum(rank) + (stages - 1) * max(rank) for rank in costs)

    def _deal(self, longest: int, ranks: int, wanted: int) -> Dealt:
        """Deals pieces of at most `longest` tokens to about `wanted` microbatches per rank.

        To fewer, if those would be small or empty; to more, if they would exceed the budget.
        """
        cut = [piece for members in self._groups for piece in self._cut(members, longest)]
        by_rank = [
            sorted(held.values(), key=lambda piece: (-self.flops(piece), piece))
            for held in self._deal_to_ranks(cut, ranks)
        ]
        tokens = max(sum(map(self.tokens, pieces)) for pieces in by_rank)
        fillable = min(max(map(len, by_rank)), tokens // LEAST_TOKENS)
        count = max(1, -(-tokens // self._budget), min(wanted, fillable))
        while True:
            dealt = [self._deal_to_microbatches(pieces, count) for pieces in by_rank]
            fitting = [microbatches for microbatches in dealt if microbatches is not None]
            if len(fitting) == ranks:
                return fitting
            count += 1

    def tokens(self, piece: Piece) -> int:
        """Tokens that a piece takes in a microbatch."""
        return self._rows[piece[0]].shared + sum(self._rows[number].own for number in piece)

    def flops(self, piece: Piece) -> float:
        """FLOPs of a piece at the cost that is balanced."""
        return self._flops(piece, self._cost)

    def _flops(self, piece: Piece, cost: Cost) -> float:
        if not piece:
            return 0.0
        rows = [self._rows[number] for number in piece]
        return cost.flops(rows[0].shared, [row.own for row in rows], sum(row.targets for row in rows))

    def all_flops(self, cost: Cost) -> float:
        """FLOPs of all groups at a cost, each with its context once: what repeats a context is no use."""
        return sum(self._flops(tuple(members), cost) for members in self._groups)

    def _cut(self, members: Sequence[int], longest: int) -> list[Piece]:
        """Cuts a group, in order, into pieces of at most `longest` tokens, or of one longer row."""
        pieces: list[Piece] = []
        for number in members:
            longer = (*pieces[-1], number) if pieces else (number,)
            if pieces and self.tokens(longer) <= longest:
                pieces[-1] = longer
            else:
                pieces.append((number,))
        return pieces

    def _deal_to_ranks(self, pieces: Sequence[Piece], ranks: int) -> list[dict[int, Piece]]:
        """What each rank gets of the pieces, by the piece's number."""
        dealt = deal([self.flops(piece) for piece in pieces], ranks)
        held = [{number: pieces[number] for number in numbers} for numbers in dealt]
        while self._improve(held):
            pass
        return held

    def _improve(self, held: list[dict[int, Piece]]) -> bool:
        """Moves rows from the slowest rank to the fastest if the slower of the two gets faster; whether it did."""
        loads = [sum(map(self.flops, pieces.values())) for pieces in held]
        slow, fast = loads.index(max(loads)), loads.index(min(loads))
        best, move = loads[slow] * 0.999, None
        for number, piece in held[slow].items():
            there = held[fast].get(number, ())
            for count in range(1, len(piece) + 1):
                stays, moved = piece[count:], (*there, *piece[:count])
                left = loads[slow] - self.flops(piece) + self.flops(stays)
                right = loads[fast] - self.flops(there) + self.flops(moved)
                if max(left, right) < best:
                    best, move = max(left, right), (number, stays, moved)
        if move is None:
            return False
        number, stays, moved = move
        held[fast][number] = moved
        held[slow][number] = stays
        if not stays:
            del held[slow][number]
        return True

    def _deal_to_microbatches(self, pieces: Sequence[Piece], count: int) -> list[list[Piece]] | None:
        """Deals pieces, costliest first, each to the lightest of `count` microbatches with room; None if none has."""
        filled: list[list[Piece]] = [[] for _ in range(count)]
        loads, tokens = [0.0] * count, [0] * count
        for piece in pieces:
            room = [n for n in range(count) if tokens[n] + self.tokens(piece) <= self._budget]
            if not room:
                return None
            lightest = min(room, key=lambda n: (loads[n], len(filled[n]), n))
            filled[lightest].append(piece)
            loads[lightest] += self.flops(piece)
            tokens[lightest] += self.tokens(piece)
        return filled


def deal(costs: Sequence[float], hands: int) -> list[list[int]]:
    """Items -> hands of about the same total cost: the costliest first, each to the hand with the least.

    Example: ``deal([5, 1, 1, 3], 2)`` is ``[[0], [3, 1, 2]]``
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    loads = [(0.0, hand) for hand in range(hands)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, hand = loads[0]
        dealt[hand].append(item)
        heapq.heapreplace(loads, (load + costs[item], hand))
    return dealt
