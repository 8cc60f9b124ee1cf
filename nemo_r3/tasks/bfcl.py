"""The Berkeley function-calling leaderboard's single-turn Python categories: 2,351 problems for tests and evaluation.

They are data files of the bfcl-eval wheel, whose Python is never imported. Per category there is a file of questions
and one of answers, JSON lines with one id:

    {"id": .., "question": [[{"role": "user", "content": ..}]], "function": [{"name": .., "parameters": {..}}]}
    {"id": .., "ground_truth": [{"get_weather": {"city": ["Paris", "Paris, France"], "unit": ["celsius", ""]}}]}

An argument's gold lists its allowed values; "" among them says that it may be left out. An object among them has such a
list for each key.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_r3.errors import UserError
from nemo_r3.tasks.matching import Equality, fits
from nemo_r3.tasks.records import Record, Row, well_formed
from nemo_r3.tasks.schemas import as_declared, member_of, object_of_berkeley, tool

CATEGORIES = (
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
)
WHEEL = "bfcl-eval==2026.3.23"

_WORDS = re.compile(r"(?=.*[^\W\d_]{3})[^\W\d_]+(?:[ ,.'-]+[^\W\d_]+)*\.?")
_GAP = re.compile(r"[ ,]+")


def spelling(text: str) -> str:
    """What two spellings of the same words have in common: neither case, nor commas and spaces between them, count.

    Only text made of letters, spaces and , . ' - is words, and only if three letters stand together: the genotypes "AA"
    and "aa" are two. Where there is a digit or any other sign it may be a number, a date, a formula, a path or a name
    in some system, and is compared as it is. The leaderboard itself ignores case and all of " ,./-_*^" everywhere,
    which makes "1.5" and "15", or "x^2" and "x2", the same.

    Example: ``spelling("Paris, France") == spelling("paris france")``
    """
    return _GAP.sub(" ", text).casefold() if _WORDS.fullmatch(text) else text


@dataclass(frozen=True)
class Listed:
    """Gold is a list of allowed values, as in the leaderboard (see `nemo_r3.tasks.matching.Rule`)."""

    equal: Equality

    def allows(self, value: Any, gold: Any) -> bool:
        """Whether one of the listed values is meant; an empty string is, where no other value is listed."""
        if value == "":
            return bool(gold == [""])
        return any(self._is(value, one) for one in gold if one != "")

    def optional(self, gold: Any) -> bool:
        """Whether the list says that the argument may be left out."""
        return "" in gold

    def _is(self, value: Any, one: Any) -> bool:
        if isinstance(one, dict):
            return isinstance(value, dict) and fits(value, one, self, {})
        if isinstance(one, list):
            return isinstance(value, list) and len(value) == len(one) and all(map(self._is, value, one))
        return self.equal(value, one)


def folder_of(source: str) -> Path | None:
    """Where the leaderboard's files are, if `source` speaks of them: "bfcl" (the installed wheel), or their directory.

    Raises:
        UserError: the wheel is not installed.
    """
    if source != "bfcl":
        folder = Path(source)
        return folder if _questions(folder, CATEGORIES[0]).is_file() else None
    try:
        wheel = importlib.metadata.distribution("bfcl-eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "task.options.source: 'bfcl' needs the data files of a wheel that is not installed: `pip install --no-deps "
            f"{WHEEL}`, or give the directory that holds them"
        ) from None
    return Path(str(wheel.locate_file("bfcl_eval/data")))


def read_bfcl(folder: Path, max_malformed: float) -> list[Record]:
    """The leaderboard's records, category by category.

    Raises:
        UserError: a file is missing, or too many rows are malformed.
    """
    return well_formed(_rows(folder), bfcl_record, str(folder), max_malformed)


def bfcl_record(row: Any) -> Record:
    """A question with its answer as a record.

    Raises:
        ValueError: it is malformed; says how.
    """
    try:
        offered = [
            tool(one["name"], one["description"], object_of_berkeley(one["parameters"])) for one in row["function"]
        ]
        schemas = {one["function"]["name"]: one["function"]["parameters"]["properties"] for one in offered}
        gold = [
            _gold_call(name, arguments, schemas) for call in row["ground_truth"] for name, arguments in call.items()
        ]
        (messages,) = row["question"]
        query = "\n\n".join(message["content"].strip() for message in messages)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a question with its answer ({type(error).__name__}: {error})") from None
    return Record(f"bfcl-{row['id']}", query, json.dumps(offered), json.dumps(gold))


def _gold_call(
    name: str, arguments: Mapping[str, list[Any]], schemas: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Gold in the terms of `Listed`; where a list allows no value of the declared type, what was meant."""
    gold = {}
    for key, listed in arguments.items():
        schema = schemas[name].get(key, {})
        if listed == [""] and schema.get("type") != "string":
            continue  # to be left out
        if listed == [] and schema.get("type") == "array":
            listed = [[]]
        gold[key] = [_listed(one, schema) for one in listed]
    return {"name": name, "arguments": gold}


def _listed(one: Any, schema: Mapping[str, Any]) -> Any:
    """An allowed value, in the types that are declared, and with a list for every key of every object in it."""
    if isinstance(one, dict):
        lists = {key: value if isinstance(value, list) else [value] for key, value in one.items()}
        return {key: [_listed(value, member_of(schema, key)) for value in lists[key]] for key in lists}
    if isinstance(one, list):
        return [_listed(item, schema.get("items", {})) for item in one]
    return as_declared(one, schema)


def _questions(folder: Path, category: str) -> Path:
    return folder / f"BFCL_v4_{category}.json"


def _rows(folder: Path) -> Iterator[Row]:
    for category in CATEGORIES:
        file = _questions(folder, category)
        try:
            golds = {answer["id"]: answer for answer in _json_lines(folder / "possible_answer" / file.name)}
            rows = [{**question, **golds.get(question["id"], {})} for question in _json_lines(file)]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"task.options.source: {str(file)!r} or its answers cannot be read ({error}); `pip install --no-deps "
                f"--force-reinstall {WHEEL}`"
            ) from error
        for number, row in enumerate(rows, 1):
            yield f"{file.name} line {number}", row


def _json_lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
