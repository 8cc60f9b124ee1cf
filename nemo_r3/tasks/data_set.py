"""Data sets: `read_columns` reads one from the hub or from disk, `LazyProblems` are its rows as problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from nemo_r3.errors import UserError, describe
from nemo_r3.types import Problem

Item = TypeVar("Item")


def read_columns(source: str, columns: Sequence[str], instead: str) -> Iterator[tuple[Any, ...]]:
    """The values of some columns, row by row; `source` is a hub name, a directory, or a .parquet or JSON-lines file.

    Raises:
        UserError: it cannot be read, or lacks a column; names `instead`, a source that needs no data set.
    """
    from datasets import load_dataset  # heavy, and needed for real data only

    path = Path(source)
    try:
        if path.is_file():
            kind = "parquet" if path.suffix == ".parquet" else "json"
            with path.open("rb") as file:
                if file.read(5).strip() == b"null":  # which ends pyarrow, and this process, in a segmentation fault
                    raise ValueError("it begins with null")
            rows = load_dataset(kind, data_files=source, split="train")
        else:
            rows = load_dataset(source, split="train")
        values = [list(rows[name]) for name in columns]
    except Exception as error:  # whatever the loader raises, the user's way out is the same
        raise UserError(
            f"task.options.source: {source!r} cannot be read ({describe(error)}); offline, download the data set "
            f"elsewhere and give the path of its parquet or JSON-lines file, with columns {', '.join(columns)}, or use "
            f"source={instead}"
        ) from error
    return zip(*values, strict=True)


class LazyProblems(Sequence[Problem], Generic[Item]):
    """Rows of a data set, which may have 450,000, as problems that are made when they are looked at."""

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
