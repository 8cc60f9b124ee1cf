"""Values are equal by type and value; calls pair up one to one."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_r3.tasks.matching import Equality, OneValue, fits, pair_up

DISTINCT = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    1.5,
    "0",
    "1",
    "true",
    "",
    "a",
    "A",
    "a ",
    [],
    [0],
    [1],
    [True],
    ["1"],
    [[1]],
]
DISTINCT += [[1, 2], [2, 1], {}, {"a": 1}, {"a": True}, {"a": [1]}, {"a": None}, {"a": 1, "b": 1}, {"b": 1}]


def test_only_a_value_itself_is_equal_to_it() -> None:
    for numbers in ("widen", "equal"):
        equal = Equality(numbers)
        for i, value in enumerate(DISTINCT):
            assert [equal(value, gold) for gold in DISTINCT] == [i == j for j in range(len(DISTINCT))]


def test_integers_and_floats_go_by_the_policy() -> None:
    widen, equal = Equality("widen"), Equality("equal")
    assert widen(3, 3.0) and equal(3, 3.0) and equal(3.0, 3)
    assert not widen(3.0, 3)
    assert widen([{"x": 3}], [{"x": 3.0}]) and not widen([{"x": 3.0}], [{"x": 3}])
    for rule in (widen, equal):
        assert not rule(True, 1.0) and not rule(1.0, True) and not rule(3, 3.5) and not rule(10**400, 1e308)


def test_a_spelling_applies_to_values_and_not_to_keys() -> None:
    equal = Equality("widen", str.casefold)
    assert equal({"a": ["X"]}, {"a": ["x"]}) and not equal({"A": "x"}, {"a": "x"})


def test_arguments_must_all_be_there_but_for_defaults_which_may_be_left_out_or_given() -> None:
    rule = OneValue(Equality("widen"))
    assert fits({"a": 1, "b": "x"}, {"b": "x", "a": 1}, rule, {})
    for fewer, more in (({"a": 1}, {"a": 1, "b": "x"}), ({"a": 1}, {"a": 1, "b": True})):
        for answer, gold in ((fewer, more), (more, fewer)):
            assert not fits(answer, gold, rule, {})
            assert fits(answer, gold, rule, {"b": "x"}) == (more["b"] == "x")
            assert not fits(answer, gold, rule, {"b": 1})


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_pairs_are_found_where_there_are_any(fitting: list[list[bool]]) -> None:
    columns = permutations(range(len(fitting)))
    assert pair_up(fitting) == any(all(fitting[row][column] for row, column in enumerate(way)) for way in columns)


@pytest.mark.parametrize("size", [0, 64])
def test_many_equal_calls_pair_up(size: int) -> None:
    assert pair_up([[True] * size] * size)
    assert not size or not pair_up([[True] * (size - 1) + [False]] * size)
