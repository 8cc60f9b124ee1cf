"""Whether calls are the wanted ones: values by type and value, calls as a multiset."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Equality:
    """Deep equality of JSON values. Unlike Python's, in which True == 1 == 1.0, it tells types apart."""

    numbers: str
    """When integers and floats are equal. "widen": an integer is as good as the wanted float, as it is to a Python
    function, but not the other way round; "equal": both ways."""
    spelling: Callable[[str], str] = str  # applied to strings before they are compared; not to the keys of objects

    def __call__(self, value: Any, gold: Any) -> bool:
        """Whether `value` is what `gold` says."""
        if isinstance(gold, dict):
            return (
                isinstance(value, dict)
                and value.keys() == gold.keys()
                and all(self(value[key], wanted) for key, wanted in gold.items())
            )
        if isinstance(gold, list):
            return isinstance(value, list) and len(value) == len(gold) and all(map(self, value, gold))
        if isinstance(gold, str):
            return isinstance(value, str) and self.spelling(value) == self.spelling(gold)
        if type(value) is type(gold):
            return bool(value == gold)
        if {type(value), type(gold)} != {int, float}:
            return False
        return bool(value == gold) and (self.numbers == "equal" or type(gold) is float)


class Rule(Protocol):
    """What the gold of an argument means."""

    def allows(self, value: Any, gold: Any) -> bool:
        """Whether an argument may have this value."""
        ...

    def optional(self, gold: Any) -> bool:
        """Whether an argument may be left out."""
        ...


@dataclass(frozen=True)
class OneValue:
    """Gold is the value itself, as in xLAM."""

    equal: Equality

    def allows(self, value: Any, gold: Any) -> bool:
        """Whether the values are equal."""
        return self.equal(value, gold)

    def optional(self, gold: Any) -> bool:
        """Never."""
        return False


def fits(arguments: Mapping[str, Any], gold: Mapping[str, Any], rule: Rule, defaults: Mapping[str, Any]) -> bool:
    """Whether these are the wanted arguments, all of them and no others.

    Args:
        arguments: of a call.
        gold: by the same names, in the terms of `rule`.
        rule: what gold means.
        defaults: arguments that may be left out, or given explicitly, at this value.
    """
    for name in arguments.keys() | gold.keys():
        if name not in gold:
            allowed = name in defaults and Equality("widen")(arguments[name], defaults[name])
        elif name in arguments:
            allowed = rule.allows(arguments[name], gold[name])
        else:
            allowed = rule.optional(gold[name]) or (name in defaults and rule.allows(defaults[name], gold[name]))
        if not allowed:
            return False
    return True


def pair_up(fitting: Sequence[Sequence[bool]]) -> bool:
    """Whether rows and columns, equally many, pair up one to one with every pair fitting.

    A greedy match would not do: a call may fit two golds, and another call only one of these (Kuhn's algorithm).
    """
    row_of: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column, fit in enumerate(fitting[row]):
            if fit and column not in tried:
                tried.add(column)
                if column not in row_of or place(row_of[column], tried):
                    row_of[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(fitting)))
