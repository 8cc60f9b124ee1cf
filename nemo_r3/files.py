"""Files that are whole whenever a process dies or a disk fills up, JSON objects, and directories with one writer."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from nemo_r3.errors import ConfigError, UserError


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old or the new content, never a part.

    Raises:
        OSError: it cannot be written; the old content stands, and nothing else is left.
    """
    writing = file.with_name(f".{file.name}.writing")
    with filename_in_errors(file):
        try:
            with writing.open("wb") as handle:
                handle.write(content.encode() if isinstance(content, str) else content)
                handle.flush()
                os.fsync(handle.fileno())
            writing.replace(file)
        finally:
            writing.unlink(missing_ok=True)


def read_json_object(file: Path, setting: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        file: what to read.
        setting: the key that led here; error messages begin with it.

    Raises:
        ConfigError: it cannot be read, or holds no JSON object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{setting}: {file} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{setting}: {file} holds no object")
    return found


@contextmanager
def filename_in_errors(path: Path) -> Iterator[None]:
    """Puts a path on an `OSError` that names none: a full disk is met in a write, which knows no name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def take_lock(directory: Path) -> None:
    """Keeps other processes from writing to a directory until this one ends.

    Raises:
        UserError: another process is at it.
    """
    handle = (directory / ".lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another process is writing to {directory}; wait for it, or name another directory") from error
    _locks.append(handle)


_locks: list[TextIO] = []
"""Held open, and so locked, until the process ends."""
