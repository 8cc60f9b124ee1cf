"""Python's types, as xLAM writes them, and the leaderboard's become JSON Schema."""

import pytest
from jsonschema import Draft202012Validator

from nemo_r3.tasks.schemas import as_declared, defaults_of, object_of_berkeley, object_of_python, tool

INTEGER, NUMBER, STRING = {"type": "integer"}, {"type": "number"}, {"type": "string"}


def schema_of(kind):
    described = object_of_python({"x": {"type": kind}})
    Draft202012Validator.check_schema(described)
    return described["properties"]["x"]


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        ("str", STRING),
        ("int", INTEGER),
        ("float", NUMBER),
        ("bool", {"type": "boolean"}),
        ("None", {"type": "null"}),
        ("string", STRING),
        ("list", {"type": "array"}),
        ("List", {"type": "array"}),
        ("List[int]", {"type": "array", "items": INTEGER}),
        ("list[List[str]]", {"type": "array", "items": {"type": "array", "items": STRING}}),
        ("typing.List[float]", {"type": "array", "items": NUMBER}),
        ("List[Any]", {"type": "array"}),
        ("Set[str]", {"type": "array", "uniqueItems": True, "items": STRING}),
        ("dict", {"type": "object"}),
        ("Dict[str, Any]", {"type": "object"}),
        ("Dict[str, List[int]]", {"type": "object", "additionalProperties": {"type": "array", "items": INTEGER}}),
        ("Tuple", {"type": "array"}),
        ("Tuple[int, ...]", {"type": "array", "items": INTEGER}),
        ("Tuple[int, str]", {"type": "array", "prefixItems": [INTEGER, STRING], "minItems": 2, "maxItems": 2}),
        ("Union[int, List[float]]", {"anyOf": [INTEGER, {"type": "array", "items": NUMBER}]}),
        ("Optional[str]", {"anyOf": [STRING, {"type": "null"}]}),
        ("int | None", {"anyOf": [INTEGER, {"type": "null"}]}),
        ("Any", {}),
        ("Callable[[float], float]", {}),
        ("np.ndarray", {}),
    ],
)
def test_a_python_type_has_a_schema(kind: str, schema: dict) -> None:
    assert schema_of(kind) == schema
    assert schema_of(f"{kind}, optional") == schema


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "List[int",
        "Callable[]int[]",
        "[int]",
        "List[int]x",
        "int,",
        "Dict[str, ,int]",
        "int, sometimes",
        None,
        ["int"],
    ],
)
def test_what_is_no_type_is_refused(kind) -> None:
    with pytest.raises(ValueError, match="type"):
        object_of_python({"x": {"type": kind}})


def test_what_has_a_default_or_is_optional_is_not_required() -> None:
    described = object_of_python(
        {
            "a": {"type": "int", "description": "a number"},
            "b": {"type": "int", "default": 3},
            "c": {"type": "str, optional"},
            "d": {"type": "Optional[str]"},
            "e": {"type": "List[int], default [1]", "enum": [[1], [2]]},
            "f": {"type": "bool", "default": ""},
        }
    )
    assert described["required"] == ["a"]
    assert described["properties"]["a"] == {"type": "integer", "description": "a number"}
    assert described["properties"]["e"] == {"type": "array", "items": INTEGER, "enum": [[1], [2]]}
    assert defaults_of(tool("f", "", described)["function"]) == {"b": 3, "f": ""}
    assert object_of_python({}) == {"type": "object", "properties": {}, "required": []}


def test_the_leaderboards_words_become_json_schemas() -> None:
    described = object_of_berkeley(
        {
            "type": "dict",
            "required": ["type"],
            "optional": ["points"],
            "properties": {
                "type": {"type": "any", "description": "a parameter of this name"},
                "points": {"type": "array", "items": {"type": "tuple", "items": {"type": "float"}}, "optional": True},
                "sizes": {"type": "dict", "additionalProperties": {"type": "float"}, "default": {}},
            },
        }
    )
    Draft202012Validator.check_schema(described)
    assert described == {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"description": "a parameter of this name"},
            "points": {"type": "array", "items": {"type": "array", "items": NUMBER}},
            "sizes": {"type": "object", "additionalProperties": NUMBER, "default": {}},
        },
    }


def test_integers_are_floats_where_numbers_are_declared() -> None:
    schema = object_of_python({"x": {"type": "List[float]"}, "y": {"type": "Dict[str, float]"}, "z": {"type": "int"}})
    value = {"x": [1, 2.5], "y": {"a": 3, "b": True}, "z": 4, "unheard_of": 5}
    assert repr(as_declared(value, schema)) == repr(
        {"x": [1.0, 2.5], "y": {"a": 3.0, "b": True}, "z": 4, "unheard_of": 5}
    )
    assert type(as_declared(2**53 + 1, NUMBER)) is int
