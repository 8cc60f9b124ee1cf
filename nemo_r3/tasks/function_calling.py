"""Function calling: answer a query with the right calls of the functions on offer (arXiv 2505.24726).

    Problem("xlam-3f9a..", "Where can I find live giveaways?", {"calls": [{"name": .., "arguments": {..}}, ..]},
            tools=({"type": "function", "function": {..}}, ..))

Problems are xLAM's (APIGen, https://huggingface.co/datasets/Salesforce/xlam-function-calling-60k) or the Berkeley
leaderboard's. They are made unique BEFORE the split, and those of one question go into one split, whatever tools they
offer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import Any

from nemo_r3.config.option import option
from nemo_r3.errors import ConfigError
from nemo_r3.tasks.bfcl import Listed, folder_of, read_bfcl, spelling
from nemo_r3.tasks.calls import FORMATS, Call, NotCallsError, read_calls
from nemo_r3.tasks.data_set import LazyProblems
from nemo_r3.tasks.matching import Equality, OneValue, Rule, fits, pair_up
from nemo_r3.tasks.protocol import Task, Wording
from nemo_r3.tasks.records import Record, problem_of, read_xlam
from nemo_r3.tasks.schemas import defaults_of
from nemo_r3.types import Problem

VERIFIER_VERSION = 2
PLACEHOLDERS = ("query",)
WORDING = Wording(
    task="{query}",
    reflect="You tried performing the task, but failed in generating the correct tool call. Reflect on what went wrong "
    "and write a short explanation that will help you do better next time.",
    retry="Now try to perform the task again.",
)


@dataclass
class Options:
    """Settings of the task, under `task.options`."""

    source: str = option(
        "Salesforce/xlam-function-calling-60k",
        help="hub name or local .json, .jsonl or .parquet file with columns query, tools and answers; or 'bfcl': the "
        "Berkeley leaderboard's problems in the bfcl-eval wheel, or the directory of its files",
    )
    test_size: int = option(12_000, low=1, help="held-out problems (the paper's number)")
    seed: int = option(0, low=0, help="seed of the split")
    max_malformed: float = option(
        0.01, low=0, high=1, help="largest share of malformed rows to leave out, saying which"
    )
    format: str = option("auto", choices=FORMATS, help="how an answer writes calls; auto: as its own markers say")
    numbers: str = option(
        "widen",
        choices=("widen", "equal"),
        help="widen: an integer is as good as the float asked for; equal: a float as the integer",
    )
    accept_defaults: bool = option(False, help="leaving an argument out is the same as giving its declared default")
    ordered: bool = option(False, help="calls must come in the gold's order")


def build(options: Options, wording: Wording) -> Task:
    """The task with its problems read and split.

    Raises:
        ConfigError: more held-out problems asked for than there are.
        UserError: the data set cannot be read, or too many of its rows are malformed.
    """
    folder = folder_of(options.source)
    if folder is not None:
        records = read_bfcl(folder, options.max_malformed)
        rule: Rule = Listed(Equality(options.numbers, spelling))
    else:
        records = read_xlam(options.source, options.max_malformed)
        rule = OneValue(Equality(options.numbers))
    make = partial(problem_of, wording=wording.task)
    problems = {name: LazyProblems(part, make) for name, part in _split(records, options).items()}
    return FunctionCalling(options, wording, problems, rule, _verifier(options, folder is not None))


def _split(records: list[Record], options: Options) -> dict[str, list[Record]]:
    """Unique records as "test" and "train"; the latter may be empty, for a data set that is there to be measured on."""
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record.id, record)
    unique = list(first.values())
    if options.test_size > len(unique):
        raise ConfigError(
            f"task.options.test_size: {options.test_size} is more than the {len(unique)} problems of {options.source!r}"
        )
    random.Random(options.seed).shuffle(unique)
    test = unique[: options.test_size]
    asked = {record.question for record in test}
    return {"test": test, "train": [one for one in unique[options.test_size :] if one.question not in asked]}


def _verifier(options: Options, listed: bool) -> str:
    """The verifier's version and what bears on a verdict."""
    gold = "bfcl" if listed else "xlam"
    defaults = "accepted" if options.accept_defaults else "exact"
    order = "gold" if options.ordered else "any"
    facts = f"gold={gold} format={options.format} numbers={options.numbers} defaults={defaults} order={order}"
    return f"function_calling-{VERIFIER_VERSION} {facts}"


@dataclass
class FunctionCalling:
    """The task (see `nemo_r3.tasks.protocol.Task`)."""

    options: Options
    wording: Wording
    splits: dict[str, LazyProblems[Record]]
    rule: Rule
    verifier: str
    name: str = "function_calling"

    def problems(self, split: str) -> LazyProblems[Record]:
        """The problems of "train" or "test"; KeyError for any other split."""
        return self.splits[split]

    def verify(self, problem: Problem, text: str) -> bool:
        """Whether the calls in `text` are exactly the gold ones, in any order, and nothing in it is malformed."""
        gold = problem.data["calls"]
        try:
            calls = read_calls(text, self.options.format)
        except NotCallsError:
            return False
        if len(calls) != len(gold):
            return False
        functions = [tool["function"] for tool in problem.tools] if self.options.accept_defaults else []
        defaults = {function["name"]: defaults_of(function) for function in functions}

        def fit(call: Call, wanted: dict[str, Any]) -> bool:
            return call.name == wanted["name"] and fits(
                call.arguments, wanted["arguments"], self.rule, defaults.get(call.name, {})
            )

        if self.options.ordered:
            return all(map(fit, calls, gold))
        return pair_up([[fit(call, wanted) for wanted in gold] for call in calls])
