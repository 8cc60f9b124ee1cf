"""`build`: checks plain mappings against a dataclass and merges them over its defaults.

    mappings (YAML, key=value) -> unknown keys, types, limits -> OmegaConf structured merge -> dataclasses

It makes the config tree and each task's own options.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import reduce
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from nemo_r3.errors import ConfigError

T = TypeVar("T")

NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
WORDS = {"True": "true", "False": "false", "None": "null"}
LONGEST_VALUE = 80


@dataclass(frozen=True)
class Layer:
    """Settings from one place."""

    values: Mapping[Any, Any]  # nested mappings, as from YAML
    source: str = ""  # prefix of errors in these values ("configs/a.yaml: "); empty for the command line


@dataclass(frozen=True)
class Leaf:
    """One setting of a dataclass tree: its dotted key, its dataclass field and its type."""

    key: str
    field: Field[Any]
    type: Any

    def of(self, tree: Any) -> Any:
        """Its value in an object of that dataclass."""
        return reduce(getattr, self.key.split("."), tree)


def leaves(schema: type, prefix: str = "") -> Iterator[Leaf]:
    """Every setting of a dataclass tree, in the order of the fields."""
    for name, (field, hint) in _members(schema).items():
        key = _join(prefix, name)
        if is_dataclass(hint):
            yield from leaves(cast(type, hint), key)
        else:
            yield Leaf(key, field, hint)


def build(schema: type[T], layers: Iterable[Layer], prefix: str = "") -> T:
    """An object of a dataclass: its defaults, overridden by the layers in order.

    Args:
        schema: the dataclass.
        layers: what differs from the defaults.
        prefix: dotted key of the dataclass, for messages ("task.options").

    Raises:
        ConfigError: a key, a type or a value that the dataclass does not allow.
    """
    known = {leaf.key: leaf.field.metadata.get("help", "") for leaf in leaves(schema, prefix)}
    tree = OmegaConf.structured(schema)
    for layer in layers:
        try:
            tree = OmegaConf.merge(tree, OmegaConf.create(_checked(schema, layer.values, prefix, known)))
        except ConfigError as error:
            raise ConfigError(f"{layer.source}{error}") from None
    if missing := OmegaConf.missing_keys(tree):
        raise ConfigError(f"{_join(prefix, min(missing))}: has no default and must be set")
    return cast(T, OmegaConf.to_object(tree))


def _checked(schema: type, values: Mapping[Any, Any], prefix: str, known: Mapping[str, str]) -> dict[str, Any]:
    """The values, once they are checked, without empty sections."""
    members, checked = _members(schema), {}
    for name, value in values.items():
        key = _join(prefix, str(name))
        if name not in members:
            raise ConfigError(_unknown(key, prefix, list(members), known))
        field, hint = members[name]
        if is_dataclass(hint):
            if value is None:
                continue
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key}: is a section, got {show(value)}; set its keys, such as {_first(known, key)}")
            checked[name] = _checked(cast(type, hint), value, key, known)
        else:
            _check_plain(key, value)
            if not _fits(value, hint):
                raise ConfigError(f"{key}: expected {describe(hint)}, got {show(value)}{_quote_hint(value, hint)}")
            _check_limits(key, value, field.metadata)
            checked[name] = value
    return checked


def _check_limits(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    for one in value if isinstance(value, list) else [value]:
        if one is not None and not _allowed(one, limits):
            why = f" ({limits['help']})" if limits["low"] is not None and limits["low"] == limits["high"] else ""
            raise ConfigError(f"{key}: {show(one)} is not allowed; it must be {describe_limits(limits)}{why}")


def _allowed(value: Any, limits: Mapping[str, Any]) -> bool:
    choices, low, high, above = (limits.get(name) for name in ("choices", "low", "high", "above"))
    return (
        (choices is None or value in choices)
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
    )


def describe_limits(limits: Mapping[str, Any]) -> str:
    """What `option()` allows, in words; empty if anything is."""
    choices, low, high, above = (limits.get(name) for name in ("choices", "low", "high", "above"))
    if choices is not None:
        return "one of " + ", ".join(str(choice) for choice in choices)
    if low is not None and low == high:
        return _number(low)
    bounds = ((above, "above"), (low, "at least"), (high, "at most"))
    return " and ".join(f"{text} {_number(bound)}" for bound, text in bounds if bound is not None)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def can_be_set(hint: Any) -> bool:
    """Whether YAML has values of a type: text, numbers, true, false, null, and lists and mappings of such."""
    if _is_union(hint):
        return all(can_be_set(part) for part in get_args(hint))
    if get_origin(hint) in (list, dict):
        return can_be_set(get_args(hint)[-1])
    return hint in (Any, list, dict) or hint in NAMES


def describe(hint: Any) -> str:
    """A type, in words."""
    if _is_union(hint):
        return " or ".join(describe(part) for part in get_args(hint))
    origin = get_origin(hint) or hint
    if origin is list:
        return ", each element ".join(["a list", *map(describe, get_args(hint))])
    return "a mapping" if origin is dict else NAMES.get(hint, str(hint))


def in_words(value: Any) -> str:
    """A value on one line, with YAML's words for true, false and null."""
    return WORDS.get(repr(value), repr(value))


def show(value: Any) -> str:
    """`in_words`, as far as a message has room for it."""
    text = in_words(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def _check_plain(key: str, value: Any) -> None:
    """Refuses values that OmegaConf would replace or reject later."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            if not isinstance(name, str):
                raise ConfigError(f"{key}: its keys must be text, got {show(name)}")
            _check_plain(_join(key, name), part)
    elif isinstance(value, list):
        for part in value:
            _check_plain(key, part)
    elif isinstance(value, str) and ("${" in value or value == "???"):
        raise ConfigError(
            f"{key}: {show(value)} is not allowed; '${{...}}' and '???' are not filled in, write the value"
        )
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise ConfigError(f"{key}: {show(value)} is not allowed; use text, numbers, true, false, lists and mappings")


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if _is_union(hint):
        return any(_fits(value, part) for part in get_args(hint))
    origin, parts = get_origin(hint) or hint, get_args(hint) or (Any, Any)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, parts[0]) for one in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(_fits(one, parts[1]) for one in value.values())
    if isinstance(value, bool) and hint is not bool:
        return False
    if hint is float:  # neither NaN nor infinite
        return isinstance(value, (int, float)) and -sys.float_info.max <= value <= sys.float_info.max
    return isinstance(value, hint)


def _quote_hint(value: Any, hint: Any) -> str:
    """A hint about text that YAML took for something else."""
    wants_text = hint is str or (_is_union(hint) and str in get_args(hint))
    return "; put quotes inside the value to keep it text" if wants_text and value is not None else ""


def _unknown(key: str, section: str, allowed: list[str], known: Mapping[str, str]) -> str:
    leaf = key.rpartition(".")[2]
    same = [other for other, about in known.items() if other.rpartition(".")[2] == leaf or f"`{leaf}`" in about]
    near = [_join(section, name) for name in get_close_matches(leaf, allowed, n=1)]
    hint = next(iter(same or near or get_close_matches(key, known, n=1)), None)
    if hint == key:  # a dotted key of a file
        hint = f"{': {'.join(key.split('.'))}: ...{'}' * key.count('.')}"
    meant = f"; did you mean {hint}?" if hint else ";"
    return f"{key}: unknown key{meant} {section or 'the top level'} has {', '.join(allowed)}"


def _members(schema: type) -> dict[str, tuple[Field[Any], Any]]:
    hints = get_type_hints(schema)
    return {field.name: (field, hints[field.name]) for field in fields(schema)}


def _is_union(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) or get_origin(hint) is Union


def _first(known: Iterable[str], section: str) -> str:
    return next(key for key in known if key.startswith(section + "."))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
