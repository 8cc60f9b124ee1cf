"""What is said where something is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo_r3.errors import UserError


def refusal(act: Callable[[], Any], kind: type[Exception] = UserError) -> str:
    """The words of an error of this kind, or "accepted". What a user can mend is said in one line."""
    try:
        act()
    except kind as error:
        assert not isinstance(error, UserError) or "\n" not in str(error), error
        return str(error)
    return "accepted"
