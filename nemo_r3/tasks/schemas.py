"""Tools as chat templates take them, from the ways in which data sets write down types.

    tool = {"type": "function", "function": {"name": .., "description": .., "parameters": <JSON Schema of an object>}}

xLAM names Python's types ("List[int], optional"), the Berkeley leaderboard nearly JSON Schema's ("dict", "float").
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

_SCALARS = {
    "str": "string",
    "string": "string",
    "int": "integer",
    "integer": "integer",
    "float": "number",
    "number": "number",
    "bool": "boolean",
    "boolean": "boolean",
    "none": "null",
    "null": "null",
}
_LISTS = {"list", "array", "sequence", "iterable", "tuple", "set"}
_OBJECTS = {"dict", "object", "mapping"}
_BERKELEY = {"dict": "object", "float": "number", "tuple": "array"}


def tool(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A function as chat templates take it; `parameters` is the JSON Schema of its arguments."""
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def object_of_python(parameters: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON Schema of xLAM's parameters.

    Example: ``{"n": {"type": "int", "description": "how many"}, "unit": {"type": "str, optional"}}`` becomes an object
    with these two properties that requires ["n"].

    Args:
        parameters: name -> type, description, perhaps default. One with a default, or with an optional type, need not
            be given. What else is said of it is kept.

    Raises:
        ValueError: a type that cannot be read.
    """
    properties, required = {}, []
    for name, facts in parameters.items():
        if not isinstance(facts["type"], str):
            raise ValueError(f"type {facts['type']!r} is not text")
        schema, optional = _declared(facts["type"])
        properties[name] = {**schema, **{key: value for key, value in facts.items() if key != "type"}}
        if not optional and "default" not in facts:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def object_of_berkeley(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON Schema of the Berkeley leaderboard's parameters; "dict", "float", "tuple", "any" are its own words."""
    schema = {key: value for key, value in parameters.items() if key not in ("optional", "type")}
    kind = parameters["type"]
    if kind != "any":
        schema["type"] = _BERKELEY.get(kind, kind)
    if "properties" in schema:
        schema["properties"] = {name: object_of_berkeley(one) for name, one in schema["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), Mapping):
            schema[key] = object_of_berkeley(schema[key])
    return schema


def defaults_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that a tool's function declares, by parameter."""
    properties = function["parameters"].get("properties", {})
    return {name: schema["default"] for name, schema in properties.items() if "default" in schema}


def as_declared(value: Any, schema: Mapping[str, Any]) -> Any:
    """The value with its integers as floats wherever the schema declares numbers."""
    if isinstance(value, list):
        return [as_declared(item, _part(schema, "items")) for item in value]
    if isinstance(value, dict):
        return {key: as_declared(one, member_of(schema, key)) for key, one in value.items()}
    if _is_number(schema) and type(value) is int and abs(value) <= 2**53:  # beyond it floats skip integers
        return float(value)
    return value


def _is_number(schema: Mapping[str, Any]) -> bool:
    """Whether the schema declares a number, possibly among other types, but not integer."""
    options = schema.get("anyOf", [schema])
    kinds = [one.get("type") for one in options if isinstance(one, Mapping)] if isinstance(options, list) else []
    return "number" in kinds and "integer" not in kinds


def member_of(schema: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What the schema of an object says of the value at `key`."""
    properties = _part(schema, "properties")
    return _part(properties, key) if key in properties else _part(schema, "additionalProperties")


def _part(schema: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A schema within a schema; data sets say other things there too, which say nothing of types."""
    found = schema.get(key)
    return found if isinstance(found, Mapping) else {}


@cache  # 60,000 rows name a few dozen types; what comes back is never changed
def _declared(text: str) -> tuple[dict[str, Any], bool]:
    """The schema of a parameter's type, and whether the type says that the parameter is optional."""
    kind, *remarks = _split(text, ",")
    for remark in remarks:
        if remark.lower() != "optional" and not remark.lower().startswith("default"):
            raise ValueError(f"type {text!r} cannot be read")
    optional = bool(remarks) or kind.lower().startswith("optional[")
    return _schema_of(kind), optional


def _schema_of(text: str) -> dict[str, Any]:
    """A Python type as JSON Schema; one that JSON has no word for (Callable, np.ndarray) allows any value."""
    options = _split(text, "|")
    if len(options) > 1:
        return {"anyOf": [_schema_of(option) for option in options]}
    head, bracket, inside = text.partition("[")
    head = head.strip().rpartition(".")[2].lower()
    if not head or (bracket and not inside.endswith("]")):
        raise ValueError(f"type {text!r} cannot be read")
    parts = _split(inside[:-1], ",") if bracket else []
    if head in _SCALARS and not parts:
        return {"type": _SCALARS[head]}
    if head in _LISTS:
        return _array_of(head, parts)
    if head in _OBJECTS:
        values = _schema_of(parts[1]) if len(parts) == 2 else {}
        return {"type": "object", **({"additionalProperties": values} if values else {})}
    if head in ("union", "optional") and parts:
        options = [*parts, "None"] if head == "optional" else parts
        return {"anyOf": [_schema_of(option) for option in options]}
    return {}


def _array_of(head: str, parts: list[str]) -> dict[str, Any]:
    """List[X], Set[X], Tuple[X, ...], or Tuple[X, Y] with its fixed length."""
    schema: dict[str, Any] = {"type": "array"}
    if head == "set":
        schema["uniqueItems"] = True
    if head == "tuple" and parts and parts[-1] != "...":
        items = [_schema_of(part) for part in parts]
        return {**schema, "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    items_schema = _schema_of(parts[0]) if parts else {}
    return {**schema, "items": items_schema} if items_schema else schema


def _split(text: str, separator: str) -> list[str]:
    """The parts between the separators that lie in no bracket.

    Raises:
        ValueError: brackets that do not match, or nothing between two separators.
    """
    parts, depth, begun = [], 0, 0
    for position, character in enumerate(text):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth < 0:
            break
        if character == separator and depth == 0:
            parts.append(text[begun:position].strip())
            begun = position + 1
    parts.append(text[begun:].strip())
    if depth != 0 or not all(parts):
        raise ValueError(f"type {text!r} cannot be read")
    return parts
