"""Tool calls as models write them, read strictly: one malformed call, and the whole answer counts for nothing.

    hermes  <tool_call>{"name": "f", "arguments": {..}}</tool_call>, a block per call   Qwen2, Qwen2.5, Qwen3
    llama   {"name": "f", "parameters": {..}}; {..}, with ; or , or white space         Llama 3.1, 3.2
            between calls and perhaps a ; at the end, or a list of calls, alone in the
            answer or after its <|python_tag|>; or one call or list in its one fence
    json    {"name": "f", "arguments": {..}}, or a list of such objects, alone in the   Phi-3.5 and others
            answer or in its one ```json fence

Llama's ways to write several calls are those that the Berkeley leaderboard or vLLM reads as well. A call has exactly
those two keys. Its arguments are an object, or the text of one. JSON is what RFC 8259 says: no NaN or Infinity, no key
twice in an object, no number beyond a double, nothing after the value. A <think>..</think> block at the start of an
answer is passed over, and so is prose around Hermes blocks and around a fence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

FORMATS = ("auto", "hermes", "llama", "json")
MAX_CHARACTERS = 20_000
"""Of an answer, its thought left out."""
MAX_DEPTH = 32
"""Objects and lists within each other."""

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_THINK, _THOUGHT = "<think>", "</think>"
_PYTHON_TAG = "<|python_tag|>"
_BACKTICKS = "```"
_BRACKETS = ("{", "[")
_FENCE = re.compile(r"```(?:json|JSON)?(?=[ \t\r\n]*[\[{])")
_SPACE = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"(?:[;,][ \t\r\n]*|(?<=[ \t\r\n]))(?=\{)")
_BYTE_ORDER_MARK = "\ufeff"
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)


class NotCallsError(ValueError):
    """The text is not, or not only, well-formed calls."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call: ``Call("get_weather", {"city": "Paris", "days": 3})``; arguments as JSON has them."""

    name: str
    arguments: dict[str, Any]


def read_calls(text: str, form: str = "auto") -> list[Call]:
    """The calls of an answer, in its order; time is linear in the length of `text`.

    Args:
        text: the answer, with or without a thought before it.
        form: one of `FORMATS`; "auto" goes by the markers in the text.

    Raises:
        NotCallsError: anything that the format does not allow, or an answer too long or nested too deeply.
    """
    answer = _after_thought(text.removeprefix(_BYTE_ORDER_MARK))
    if len(answer) > MAX_CHARACTERS:
        raise NotCallsError("too long")
    answer = answer.strip()
    form = _form_of(answer) if form == "auto" else form
    if form == "hermes":
        return [_call(value, "arguments") for value in _blocks(answer)]
    if form == "llama":
        bare = answer.startswith((*_BRACKETS, _PYTHON_TAG))
        values = _separated(answer.removeprefix(_PYTHON_TAG)) if bare else _listed(_fenced(answer))
        return [_call(value, "parameters") for value in values]
    value = parse_json(answer) if answer.startswith(_BRACKETS) else _fenced(answer)
    return [_call(one, "arguments") for one in _listed(value)]


def parse_json(text: str) -> Any:
    """The JSON value that a text is, under the rules above.

    Raises:
        NotCallsError: it is not one value, or nested too deeply.
    """
    value, end = _value_at(text, 0)
    if end != len(text):
        raise NotCallsError(f"text after the JSON: {text[end : end + 20]!r}")
    return value


def _after_thought(text: str) -> str:
    text = text.lstrip()
    if not text.startswith(_THINK):
        return text
    _, ended, answer = text.partition(_THOUGHT)
    if not ended:
        raise NotCallsError("a thought without end")
    return answer


def _form_of(answer: str) -> str:
    """The format that an answer's own markers, or else the keys of its first call, speak of."""
    if answer.startswith(_PYTHON_TAG):
        return "llama"
    start = 0
    if not answer.startswith(_BRACKETS):
        if _OPEN in answer:
            return "hermes"
        start = _fence(answer)
    value, _ = _value_at(answer, start)
    first = value[0] if isinstance(value, list) and value else value
    return "llama" if isinstance(first, dict) and "parameters" in first else "json"


def _blocks(answer: str) -> Iterator[Any]:
    """The values in Hermes blocks; there is at least one."""
    end, start = 0, answer.find(_OPEN)
    if start < 0:
        raise NotCallsError("no call")
    while start >= 0:
        _refuse_marker(_CLOSE, answer[end:start])
        value, end = _value_at(answer, start + len(_OPEN))
        if not answer.startswith(_CLOSE, end):
            raise NotCallsError(f"text after a call: {answer[end : end + 20]!r}")
        end += len(_CLOSE)
        yield value
        start = answer.find(_OPEN, end)
    _refuse_marker(_CLOSE, answer[end:])


def _separated(answer: str) -> list[Any]:
    """The values in a list, or one or more with a semicolon, a comma or white space between them."""
    answer = answer.strip().removesuffix(";")
    if answer.startswith("["):
        return _listed(parse_json(answer))
    value, end = _value_at(answer, 0)
    values = [value]
    while end < len(answer):
        between = _BETWEEN.match(answer, end)
        if between is None:
            raise NotCallsError(f"text after a call: {answer[end : end + 20]!r}")
        value, end = _value_at(answer, between.end())
        values.append(value)
    return values


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _fence(answer: str) -> int:
    """Where the value in the only fence of an answer begins."""
    fence = _FENCE.search(answer)
    if fence is None:
        raise NotCallsError("no call")
    _refuse_marker(_BACKTICKS, answer[: fence.start()])
    return fence.end()


def _fenced(answer: str) -> Any:
    """The value in the only fence of an answer."""
    value, end = _value_at(answer, _fence(answer))
    if not answer.startswith(_BACKTICKS, end):
        raise NotCallsError(f"text after the call: {answer[end : end + 20]!r}")
    _refuse_marker(_BACKTICKS, answer[end + len(_BACKTICKS) :])
    return value


def _refuse_marker(marker: str, prose: str) -> None:
    if marker in prose:
        raise NotCallsError(f"{marker} without a call")


def _call(value: Any, key: str) -> Call:
    """The call that a JSON value is, its arguments under `key`."""
    if not isinstance(value, dict) or value.keys() != {"name", key}:
        raise NotCallsError(f"a call is an object with the keys name and {key}")
    name, arguments = value["name"], value[key]
    if isinstance(arguments, str):
        arguments = parse_json(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise NotCallsError(f"name must be text, and {key} an object")
    return Call(name, arguments)


def _value_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value at `start`, and where the text goes on after it; white space around it is skipped."""
    start = _after_space(text, start)
    _check_depth(text, start)
    try:
        value, end = _DECODER.raw_decode(text, start)
    except ValueError as error:  # also of integers too long for Python to read
        raise NotCallsError(str(error)) from None
    return value, _after_space(text, end)


def _after_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    assert match is not None, "matches nothing, too"
    return match.end()


def _check_depth(text: str, start: int) -> None:
    """Looks ahead, so that the decoder, which recurses, never meets a value that is nested too deeply."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text, start):
        if match[0] in ("{", "["):
            depth += 1
            if depth > MAX_DEPTH:
                raise NotCallsError("nested too deeply")
        elif match[0] in ("}", "]"):
            depth -= 1
            if depth <= 0:
                return


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise NotCallsError("a key twice in an object")
    return members


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise NotCallsError(f"{digits} is beyond a double")
    return number


def _no_constant(name: str) -> Any:
    raise NotCallsError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_no_constant)
