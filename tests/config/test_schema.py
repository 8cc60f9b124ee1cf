"""`build` on a dataclass of one's own, as tasks use it for their options."""

from dataclasses import dataclass, field

import pytest
from refusals import refusal

from nemo_r3.config.option import option
from nemo_r3.config.schema import Layer, build, can_be_set, leaves


@dataclass
class Options:
    numbers: list[int] = option(factory=lambda: [3, 4], low=2, high=6, help="how many numbers")
    source: str = option("generator", choices=("generator", "dataset"), help="where problems come from")
    limit: int | None = option(None, low=1, help="how many problems")


def test_build_fills_in_defaults() -> None:
    assert build(Options, []) == Options()
    assert build(Options, [Layer({"numbers": [2]}), Layer({"limit": 5})]) == Options(numbers=[2], limit=5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"number": [3]}, "task.options.number: unknown key; did you mean task.options.numbers?"),
        ({"numbers": [3, 7]}, "task.options.numbers: 7 is not allowed; it must be at least 2 and at most 6"),
        ({"source": "web"}, "task.options.source: 'web' is not allowed; it must be one of generator, dataset"),
        ({"limit": 0}, "task.options.limit: 0 is not allowed; it must be at least 1"),
        ({"limit": "3"}, "task.options.limit: expected an integer or null, got '3'"),
    ],
)
def test_build_refuses_by_full_key(values: dict[str, object], message: str) -> None:
    assert refusal(lambda: build(Options, [Layer(values)], prefix="task.options")).startswith(message)


def test_plain_dataclass_fields_need_no_limits() -> None:
    @dataclass
    class Plain:
        depth: int = 3
        words: list = field(default_factory=list)
        rest: dict = field(default_factory=dict)

    assert all(can_be_set(leaf.type) for leaf in leaves(Plain)), "a task's options may be such"
    assert build(Plain, [Layer({"depth": -1, "words": ["a", 1], "rest": {"b": None}})]) == Plain(
        -1, ["a", 1], {"b": None}
    )
    assert refusal(lambda: build(Plain, [Layer({"words": 3})])) == "words: expected a list, got 3"
