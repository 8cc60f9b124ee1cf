"""`option`: a dataclass field with its limits, so that these are in the same place as the default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, field
from typing import Any


def option(
    default: Any = MISSING,
    *,
    help: str,  # noqa: A002
    factory: Any = MISSING,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    resume: bool = False,
) -> Any:
    """A config field.

    Args:
        default: of the setting; nothing else sets one.
        help: one line for docs/config.md. A `name` in it is another library's for the setting, and leads to it.
        factory: makes a mutable default instead.
        choices: the only values allowed (of each element, for a list).
        low: the smallest value allowed.
        high: the largest value allowed.
        above: values must be greater than this.
        resume: whether a resumed run may change it (layout, paths and logging may).
    """
    limits = {"help": help, "choices": choices, "low": low, "high": high, "above": above, "resume": resume}
    return field(default=default, default_factory=factory, metadata=limits)
