"""Which engine does what: work dealt statically, results collected on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from nemo_r3.runtime import World

T = TypeVar("T")


@dataclass(frozen=True)
class Fleet:
    """The engines of a run: engine e is made of ranks e * tensor_parallel and the next ones.

    Attributes:
        world: all ranks.
        tensor_parallel: ranks per engine.
    """

    world: World
    tensor_parallel: int

    @property
    def engines(self) -> int:
        """Number of engines."""
        return self.world.size // self.tensor_parallel

    @property
    def index(self) -> int:
        """The engine that this rank belongs to."""
        return self.world.rank // self.tensor_parallel

    def mine(self, costs: Sequence[int]) -> list[int]:
        """The items that this rank's engine works on, in ascending order."""
        return deal(costs, self.engines)[self.index]

    def collect(self, done: Mapping[int, T], count: int) -> list[T]:
        """What every engine has done, by item, on every rank.

        Args:
            done: item -> result, of this rank's engine.
            count: number of items of all engines together.
        """
        speaks = self.world.rank % self.tensor_parallel == 0
        merged: dict[int, T] = {}
        for part in self.world.gather(dict(done) if speaks else {}):
            merged.update(part)
        assert merged.keys() == set(range(count)), "an engine lost some of its work"
        return [merged[item] for item in range(count)]


def deal(costs: Sequence[int], hands: int) -> list[list[int]]:
    """Items -> hands of about the same total cost, each in ascending order; the same everywhere.

    Example: ``deal([5, 1, 1, 3], 2)`` is ``[[0], [1, 2, 3]]``
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    load = [0] * hands
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        hand = load.index(min(load))
        dealt[hand].append(item)
        load[hand] += costs[item]
    return [sorted(hand) for hand in dealt]
