"""`user_code`: runs part of a user's task module, and turns what it raises into one line that names the place."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

from nemo_r3.errors import UserError, describe

NOT_THE_USERS = (str(Path(__file__).parents[1]) + "/", str(Path(importlib.__file__).parent) + "/", "<frozen ")
"""Prefixes of the files of nemo_r3 and of Python's import: the first frame outside them is in the user's module."""


@contextmanager
def user_code(what: str, remedy: str) -> Iterator[None]:
    """Runs its block, which calls a user's module, and restores the working directory.

    Args:
        what: the part that runs, such as "doubles.verify".
        remedy: ends the message.

    Raises:
        UserError: the block raised, or called sys.exit; a UserError of its own says enough and stays as it is.
    """
    try:
        with chdir("."):
            yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"task.name: {what} raised {describe(error)}{_place(error)}{remedy}") from error


def _place(error: BaseException) -> str:
    """The file and line of the error in the module that nemo_r3 called; empty where the call itself failed."""
    if isinstance(error, SyntaxError):
        return f" in {error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(NOT_THE_USERS)]
    theirs = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" in {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
