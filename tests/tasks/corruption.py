"""What can be wrong with a right answer to a problem of the Berkeley leaderboard, call by call and value by value.

A wrong answer is (how it is wrong, its calls); calls are objects with name and arguments. Nothing here asks the
verifier: a changed value is wrong because no listed one is written like it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Calls = list[dict[str, Any]]


def gold_calls(problem) -> Calls:
    """A right answer: of each list of allowed values the first one that is not "may be left out"."""
    return [
        {"name": call["name"], "arguments": {k: value(v) for k, v in call["arguments"].items() if v != [""]}}
        for call in problem.data["calls"]
    ]


def value(listed: list[Any]) -> Any:
    return plain(next(one for one in listed if one != ""))


def plain(one: Any) -> Any:
    if isinstance(one, dict):
        return {key: value(listed) for key, listed in one.items() if listed != [""]}
    return [plain(item) for item in one] if isinstance(one, list) else one


def wrong_answers(problem) -> Iterator[tuple[str, Calls]]:
    calls, golds = gold_calls(problem), problem.data["calls"]
    offered = [tool["function"]["name"] for tool in problem.tools]
    yield "no call", []
    yield "a call twice", [*calls, calls[0]]
    if len(calls) > 1:
        yield "a call too few", calls[:-1]
        if calls[0] != calls[1]:
            yield "a call instead of another", [calls[0], calls[0], *calls[2:]]
    for at, (call, gold) in enumerate(zip(calls, golds, strict=True)):
        others = ({**call, "name": name} for name in [call["name"] + "_", *offered] if name != call["name"])
        yield from (("function", replaced(calls, at, other)) for other in others)
        for how, arguments in wrong_arguments(call["arguments"], gold["arguments"]):
            yield how, replaced(calls, at, {**call, "arguments": arguments})


def replaced(items: list[Any], at: int, item: Any) -> list[Any]:
    return [*items[:at], item, *items[at + 1 :]]


def wrong_arguments(arguments: dict[str, Any], gold: dict[str, list[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "argument too many", {**arguments, "unheard_of": 1}
    for name, argument in arguments.items():
        if "" not in gold[name]:
            yield "argument left out", {key: one for key, one in arguments.items() if key != name}
        yield "argument's name", {(key + "_" if key == name else key): one for key, one in arguments.items()}
        listed = {json.dumps(plain(one)) for one in gold[name]}
        for how, other in wrong_values(argument, gold[name]):
            if json.dumps(other) not in listed:
                yield how, {**arguments, name: other}


def wrong_values(right: Any, listed: list[Any]) -> Iterator[tuple[str, Any]]:
    """Other values; some of them may be listed, too."""
    yield "null", None if right is not None else "null"
    if isinstance(right, bool):
        yield from (("value", not right), ("type", int(right)), ("type", str(right).lower()))
    elif isinstance(right, int):
        yield from (("value", right + 1), ("value", -right - 1), ("value", right + 0.5))
        yield from (("type", str(right)), ("type", float(right)), ("type", [right]))
        if right in (0, 1):
            yield "type", bool(right)
    elif isinstance(right, float):
        yield from (("value", right + 1), ("value", -right - 1), ("type", str(right)), ("type", [right]))
    elif isinstance(right, str):
        yield from wrong_texts(right, listed)
    elif isinstance(right, list):
        yield from wrong_lists(right, listed)
    elif isinstance(right, dict):
        yield from wrong_objects(right, next(one for one in listed if one != ""))


def wrong_texts(right: str, listed: list[Any]) -> Iterator[tuple[str, Any]]:
    yield from (("value", right + " 7"), ("value", "no " + right), ("type", [right]), ("type", {"value": right}))
    if listed != [""]:
        yield "empty text", ""
    if any(character.isdigit() for character in right):
        for sign in "./-_*^":
            if sign in right:
                yield f"a sign that counts, {sign}", right.replace(sign, "")
        if right.swapcase() != right:
            yield "case of a code", right.swapcase()


def wrong_lists(right: list[Any], listed: list[Any]) -> Iterator[tuple[str, Any]]:
    yield from (("element too many", [*right, *(right[-1:] or [0])]), ("type", json.dumps(right)))
    if right:
        yield "element too few", right[:-1]
        yield "order of elements", right[::-1]
        one = next(one for one in listed if one != "")[0]
        yield from ((f"element's {how}", [other, *right[1:]]) for how, other in wrong_values(right[0], [one]))


def wrong_objects(right: dict[str, Any], pattern: dict[str, list[Any]]) -> Iterator[tuple[str, Any]]:
    yield "key too many", {**right, "unheard_of": 1}
    for key in right:
        if "" not in pattern[key]:
            yield "key left out", {name: one for name, one in right.items() if name != key}
        listed = {json.dumps(plain(one)) for one in pattern[key]}
        for how, other in wrong_values(right[key], pattern[key]):
            if json.dumps(other) not in listed:
                yield f"member's {how}", {**right, key: other}
