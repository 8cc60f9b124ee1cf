"""Files that stay whole if a process dies or a disk fills up, JSON objects, and directories with a single writer."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from nemo_r3.errors import ConfigError, UserError
from nemo_r3.progress import warn

LOST_NODE_SECONDS = 180
"""How long a file server may keep the lock of a node that was lost."""
UNREADABLE = "unreadable"
"""In place of the SHA-256 of a file that cannot be read."""
LOCKLESS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old or the new content, never a part.

    Raises:
        OSError: it cannot be written; the old content stays, and nothing else is left behind.
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


def lines_of(file: Path) -> list[str]:
    """The lines of a log; none if it does not exist."""
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []


def read_json_object(file: Path, setting: str) -> dict[str, Any]:
    """The JSON object in a file; error messages begin with `setting`, the key that led there.

    Raises:
        ConfigError: it cannot be read, or holds no JSON object.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: {file} is not JSON ({error})") from error
    return parse_json_object(text, f"{setting}: {file}")


def json_lines(file: Path, unread: list[str]) -> list[dict[str, Any]]:
    """The JSON objects in a file of one per line; none if it does not exist. `unread` is told what cannot be read."""
    try:
        lines = lines_of(file)
    except OSError as error:
        unread.append(f"{file} ({error.strerror})")
        return []
    found = []
    for line in lines:
        with suppress(ConfigError):
            found.append(parse_json_object(line, str(file)))
    if damaged := len(lines) - len(found):
        unread.append(f"{damaged} of the {len(lines)} lines of {file}")
    return found


def parse_json_object(text: str, place: str) -> dict[str, Any]:
    """The JSON object in a text; `place` says in errors where that is.

    Raises:
        ConfigError: it is no JSON object.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{place} holds no object")
    return content


def sealed(content: Mapping[str, Any]) -> str:
    """A JSON object's text, with a SHA-256 of all the rest of it under "sum"."""
    return json.dumps({**content, "sum": _sum(content)}, indent=1) + "\n"


def unsealed(text: str) -> dict[str, Any]:
    """The object that `sealed` wrote.

    Raises:
        ValueError: it is no JSON object, or was changed.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        content = None
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    if content.pop("sum", None) != _sum(content):
        raise ValueError("changed since it was written")
    return content


def _sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sum_of(file: Path) -> str:
    """A file's SHA-256, or UNREADABLE."""
    try:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        return UNREADABLE


@contextmanager
def filename_in_errors(path: Path) -> Iterator[None]:
    """Adds a path to an `OSError` that has none, such as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def take_lock(directory: Path) -> None:
    """Keeps other processes from writing to a directory until this one ends.

    A requeued Slurm job waits for the lock, which a lost node may still hold. If the file system has no locks, a
    warning says so.

    Raises:
        UserError: another process holds the lock.
    """
    handle = (directory / ".lock").open("w")
    patience = LOST_NODE_SECONDS if int(os.environ.get("SLURM_RESTART_COUNT") or 0) else 0
    begun = time.monotonic()
    while not _locked(handle):
        if time.monotonic() - begun >= patience:
            raise UserError(
                f"another process is writing to {directory}; wait for it, or name another directory (if none is, "
                f"remove {directory}/.lock)"
            )
        time.sleep(1)
    _locks.append(handle)


def _locked(handle: TextIO) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in LOCKLESS:
            raise
        warn(f"{handle.name} cannot be locked here ({error.strerror}): run only one job on it")
    return True


_locks: list[TextIO] = []
"""Files that stay open, and so locked, until the process ends."""
