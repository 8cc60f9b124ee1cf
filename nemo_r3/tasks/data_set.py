"""`read_columns`: a data set from the hub or from disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_r3.errors import UserError, describe


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
