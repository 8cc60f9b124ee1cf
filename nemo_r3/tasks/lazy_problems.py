"""`LazyProblems`: problems that are made when looked at, since a data set may have 450,000."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, overload

from nemo_r3.types import Problem

Item = TypeVar("Item")


class LazyProblems(Sequence[Problem], Generic[Item]):
    """Items, such as rows of a data set, seen as problems."""

    def __init__(self, items: Sequence[Item], make: Callable[[Item], Problem]) -> None:
        """`make` makes an item's problem, the same each time."""
        self._items, self._make = items, make

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Problem: ...

    @overload
    def __getitem__(self, index: slice) -> LazyProblems[Item]: ...

    def __getitem__(self, index: int | slice) -> Problem | LazyProblems[Item]:
        if isinstance(index, slice):
            return LazyProblems(self._items[index], self._make)
        return self._make(self._items[index])
