"""Rows of a function-calling data set: read, checked, kept as text until a problem is looked at.

xLAM's rows, the real data set's (https://huggingface.co/datasets/Salesforce/xlam-function-calling-60k), have

    query    "What is the weather in Paris and Rome?"
    tools    '[{"name": .., "description": .., "parameters": {name: {"type": "str, optional", ..}}}]'
    answers  '[{"name": .., "arguments": {..}}, ..]'

the last two as JSON in strings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_r3.errors import UserError
from nemo_r3.progress import is_rank_0
from nemo_r3.tasks.calls import parse_json
from nemo_r3.tasks.data_set import read_columns
from nemo_r3.tasks.schemas import as_declared, object_of_python, tool
from nemo_r3.tasks.template import fill, is_unicode
from nemo_r3.types import Problem

MOST_CALLS = 64
SHOWN = 5
COLUMNS = ("query", "tools", "answers")

Row = tuple[str, Any]
"""Where a row stands ("line 3") and what stands there: its text, or its fields."""


@dataclass(frozen=True, slots=True)
class Record:
    """A problem, its structured parts as JSON text: the real data set would take a GB as objects."""

    id: str  # unique and stable
    query: str  # what the user asks
    tools: str  # list of tools, see `nemo_r3.tasks.schemas`
    calls: str  # list of {"name": .., "arguments": {..}}: the gold

    @property
    def question(self) -> str:
        """The query without case and superfluous white space."""
        return _question(self.query)


def problem_of(record: Record, wording: str) -> Problem:
    """The problem of a record, in the words of a task turn with {query}."""
    text = fill(wording, {"query": record.query})
    return Problem(record.id, text, {"calls": json.loads(record.calls)}, tuple(json.loads(record.tools)))


def well_formed(rows: Iterable[Row], read: Callable[[Any], Record], source: str, max_malformed: float) -> list[Record]:
    """The records of the rows that can be read; says how many cannot, and which.

    Args:
        rows: of a data set.
        read: makes a record of a row's fields; ValueError where it cannot.
        source: its name, for messages.
        max_malformed: the largest share of rows to leave out.

    Raises:
        UserError: more rows are malformed than that, or there are none.
    """
    records, malformed, count = [], [], 0
    for place, row in rows:
        count += 1
        try:
            record = read(parse_json(row.strip()) if isinstance(row, str) else row)
            _refuse_half_characters(record)
            records.append(record)
        except ValueError as error:
            malformed.append(f"{place}: {error}")
    if not count:
        raise UserError(f"task.options.source: {source!r} holds no rows")
    if not malformed:
        return records
    more = [f"{len(malformed) - SHOWN} more"] if len(malformed) > SHOWN else []
    found = f"{len(malformed)} of {count} rows of {source!r} are malformed ({'; '.join([*malformed[:SHOWN], *more])})"
    if len(malformed) > max_malformed * count:
        raise UserError(
            f"task.options.source: {found}; fix them, or raise task.options.max_malformed={max_malformed:g} to leave "
            "them out"
        )
    if is_rank_0():
        print(f"task.options.source: left out: {found}", flush=True)
    return records


def _refuse_half_characters(record: Record) -> None:
    tools = json.dumps(json.loads(record.tools), ensure_ascii=False) if "\\ud" in record.tools else ""
    if not is_unicode(record.query + tools):
        raise ValueError("query or tools hold half a character, a lone surrogate")


def read_xlam(source: str, max_malformed: float) -> list[Record]:
    """The records of xLAM's data set or one like it, without repeats.

    Raises:
        UserError: it cannot be read, or too many rows are malformed.
    """
    path = Path(source)
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        rows = _lines(path)
    else:
        values = read_columns(source, COLUMNS, instead="bfcl")
        rows = ((f"row {number}", dict(zip(COLUMNS, row, strict=True))) for number, row in enumerate(values, 1))
    return well_formed(rows, xlam_record, source, max_malformed)


def xlam_record(row: Any) -> Record:
    """A row of xLAM as a record; integers in the gold become floats where a number is declared.

    Raises:
        ValueError: the row is malformed; says how.
    """
    query, tools, answers = (_field(row, name) for name in COLUMNS)
    offered = [_xlam_tool(one) for one in _list_in(tools, "tools")]
    schemas = {one["function"]["name"]: one["function"]["parameters"]["properties"] for one in offered}
    gold = [_xlam_call(one, schemas) for one in _list_in(answers, "answers")]
    if not 0 < len(gold) <= MOST_CALLS:
        raise ValueError(f"answers has {len(gold)} calls, not 1 to {MOST_CALLS}")
    written = [[json.dumps(one) for one in ones] for ones in (offered, gold)]
    facts = [[_question(query)], *map(sorted, written)]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return Record(f"xlam-{digest[:16]}", query, *(f"[{', '.join(ones)}]" for ones in written))


def _question(query: str) -> str:
    return " ".join(query.split()).casefold()


def _field(row: Any, name: str) -> str:
    text = row.get(name) if isinstance(row, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} is not text")
    return text


def _list_in(text: str, name: str) -> list[Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error})") from None
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list")
    return value


def _xlam_tool(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("tools has one without a name")
    name, parameters = value["name"], value.get("parameters")
    if not isinstance(parameters, dict):
        raise ValueError(f"tool {name!r} has no object of parameters")
    for parameter, facts in parameters.items():
        if not isinstance(facts, dict) or "type" not in facts:
            raise ValueError(f"tool {name!r}: parameter {parameter!r} has no type")
    return tool(name, str(value.get("description") or ""), object_of_python(parameters))


def _xlam_call(value: Any, schemas: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"} or not isinstance(value["arguments"], dict):
        raise ValueError("answers has one that is not a name and an object of arguments")
    name, arguments = value["name"], value["arguments"]
    if not isinstance(name, str) or name not in schemas:
        raise ValueError(f"answers calls {name!r}, which tools does not offer")
    declared = {key: as_declared(argument, schemas[name].get(key, {})) for key, argument in arguments.items()}
    return {"name": name, "arguments": declared}


def _lines(path: Path) -> Iterator[Row]:
    """The lines of a JSON-lines file, or the elements of a file that is one JSON list."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return ((f"row {number}", row) for number, row in enumerate(json.loads(text), 1))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"task.options.source: {str(path)!r} cannot be read ({error})") from error
    return ((f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
