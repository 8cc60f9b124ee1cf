"""Countdown: make a target from given numbers, each used exactly once (arXiv 2505.24726; TinyZero).

    Problem("countdown-3-5-7-22", "Using the numbers [5, 3, 7], create an equation that equals 22. ...",
            {"numbers": [5, 3, 7], "target": 22})

Problems are either generated, solvable by construction with integers all along, or read from a data set with columns
`target` and `nums`. Either way they are made unique by (target, sorted numbers) BEFORE the split: 8.3 % of the public
data set's rows repeat others with the numbers in another order, and a plain random split would leak them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations, combinations_with_replacement
from math import comb
from typing import Any

from nemo_r3.config.option import option
from nemo_r3.errors import ConfigError, UserError
from nemo_r3.tasks.arithmetic import Expression, NotArithmeticError, answer_of, parse_equation
from nemo_r3.tasks.data_set import LazyProblems, read_columns
from nemo_r3.tasks.protocol import Task, Wording
from nemo_r3.tasks.template import fill
from nemo_r3.types import Problem

VERIFIER_VERSION = 2
PLACEHOLDERS = ("numbers", "target")
WORDING = Wording(
    task="Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic "
    "operations (+, -, *, /) and each number can only be used once.",
)
MOST_HANDS = 20_000
FRUITLESS_DRAWS = 50_000

Hand = tuple[int, ...]


@dataclass
class Options:
    """Settings of the task, under `task.options`."""

    source: str = option(
        "generated", help="'generated', or a data set with columns target and nums: hub name or local path"
    )
    test_size: int = option(15_000, low=1, help="held-out problems (the paper's number)")
    seed: int = option(0, low=0, help="seed of generation and split")
    allow_fractions: bool = option(True, help="accept answers with intermediate results that are not integers")
    operators: str = option("+-*/", help="operators an answer may use, out of +-*/")
    size: int = option(40_000, low=0, help="generated: number of problems; 0: every possible one, for small spaces")
    numbers_min: int = option(3, low=2, high=6, help="generated: fewest numbers in a problem")
    numbers_max: int = option(4, low=2, high=6, help="generated: most numbers in a problem")
    smallest: int = option(1, low=1, high=9999, help="generated: smallest number")
    largest: int = option(99, low=1, high=9999, help="generated: largest number")
    target_min: int = option(10, low=0, help="generated: smallest target")
    target_max: int = option(100, low=0, help="generated: largest target")


def build(options: Options, wording: Wording) -> Task:
    """The task with its problems read or generated and split.

    Raises:
        ConfigError: options that do not fit each other.
        UserError: the data set cannot be read, or has numbers that are no integers.
    """
    _check(options)
    if options.source == "generated":
        deals = _every_deal(options) if options.size == 0 else _random_deals(options)
    else:
        deals = _read_deals(options.source)
    deals = _unique(deals)
    if options.test_size >= len(deals):
        raise ConfigError(
            f"task.options.test_size: {options.test_size} leaves nothing to train on: there are {len(deals)} problems"
        )
    random.Random(options.seed).shuffle(deals)
    splits = {"test": deals[: options.test_size], "train": deals[options.test_size :]}
    make = partial(problem_of, wording=wording.task)
    problems = {name: LazyProblems(part, make) for name, part in splits.items()}
    return Countdown(options, wording, problems, _verifier(options))


def _verifier(options: Options) -> str:
    """The verifier's version and the options that bear on a verdict."""
    fractions = "fractions" if options.allow_fractions else "integers"
    return f"countdown-{VERIFIER_VERSION} operators={''.join(sorted(options.operators))} {fractions}"


@dataclass(frozen=True, slots=True)
class Deal:
    """Numbers in the order they are shown, and the target to make from them."""

    numbers: Hand
    target: int

    @property
    def id(self) -> str:
        """The same for every order of the numbers."""
        return "-".join(["countdown", *map(str, sorted(self.numbers)), str(self.target)])


def problem_of(deal: Deal, wording: str) -> Problem:
    """The problem of a deal, in the words of a task turn with {numbers} and {target}."""
    numbers = ", ".join(map(str, deal.numbers))
    text = fill(wording, {"numbers": f"[{numbers}]", "target": str(deal.target)})
    return Problem(deal.id, text, {"numbers": list(deal.numbers), "target": deal.target})


@dataclass
class Countdown:
    """The task (see `nemo_r3.tasks.protocol.Task`)."""

    options: Options
    wording: Wording
    splits: dict[str, LazyProblems[Deal]]
    verifier: str
    name: str = "countdown"

    def problems(self, split: str) -> LazyProblems[Deal]:
        """The problems of "train" or "test"; KeyError for any other split."""
        return self.splits[split]

    def verify(self, problem: Problem, text: str) -> bool:
        """Whether the answer in `text` makes the target: each side of its equation, or the one expression that it is,
        equals the target exactly, and one of them uses every given number exactly once."""
        try:
            sides = parse_equation(answer_of(text))
        except NotArithmeticError:
            return False
        target = problem.data["target"]
        return all(side.value == target for side in sides) and any(self._is_made_of(problem, side) for side in sides)

    def _is_made_of(self, problem: Problem, side: Expression) -> bool:
        """Whether an expression uses the given numbers, each exactly once, in ways that the options allow."""
        return (
            sorted(side.numbers) == sorted(problem.data["numbers"])
            and side.operators <= set(self.options.operators)
            and (side.integral or self.options.allow_fractions)
        )


def solutions(hand: Hand, operators: str) -> Iterator[tuple[int, str]]:
    """Every integer that the numbers make, each used once and with integers all along, with an expression for it.

    A value comes as often as there are expressions for it.

    Example: ``dict(solutions((1, 2), "+-"))`` is ``{3: "1+2", -1: "1-2", 1: "2-1"}``
    """
    for value, text in _combine([(number, str(number)) for number in hand], operators):
        yield value, text[1:-1]


def _combine(terms: list[tuple[int, str]], operators: str) -> Iterator[tuple[int, str]]:
    if len(terms) == 1:
        yield terms[0]
        return
    for i, j in combinations(range(len(terms)), 2):
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        for left, right in ((terms[i], terms[j]), (terms[j], terms[i])):
            for operator in operators:
                if operator in "+*" and left is terms[j]:
                    continue
                value = _apply(operator, left[0], right[0])
                if value is not None:
                    yield from _combine([(value, f"({left[1]}{operator}{right[1]})"), *rest], operators)


def _apply(operator: str, left: int, right: int) -> int | None:
    """The value, or None where a division does not come out even."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    return left // right if right and left % right == 0 else None


def _every_deal(options: Options) -> Iterator[Deal]:
    """Every problem of the space, its numbers shown in an order drawn from the seed."""
    rng = random.Random(options.seed)
    span = range(options.smallest, options.largest + 1)
    counts = range(options.numbers_min, options.numbers_max + 1)
    hands = sum(comb(len(span) + count - 1, count) for count in counts)
    if hands > MOST_HANDS:
        raise ConfigError(
            f"task.options.size: 0 means every problem, and {hands:,} sets of numbers are too many; give a size"
        )
    for count in counts:
        for hand in combinations_with_replacement(span, count):
            for value in sorted({value for value, _ in solutions(hand, options.operators)}):
                if options.target_min <= value <= options.target_max:
                    yield Deal(tuple(rng.sample(hand, count)), value)


def _random_deals(options: Options) -> Iterable[Deal]:
    """`size` distinct problems: draw numbers, join them at random, keep what lands in the range of targets."""
    rng = random.Random(options.seed)
    deals: dict[str, Deal] = {}
    fruitless = 0
    while len(deals) < options.size:
        count = rng.randint(options.numbers_min, options.numbers_max)
        hand = tuple(rng.randint(options.smallest, options.largest) for _ in range(count))
        value = _join_at_random(hand, options.operators, rng)
        known = len(deals)
        if value is not None and options.target_min <= value <= options.target_max:
            deal = Deal(hand, value)
            deals.setdefault(deal.id, deal)
        fruitless = 0 if len(deals) > known else fruitless + 1
        if fruitless == FRUITLESS_DRAWS:
            found = f"only {len(deals)} distinct problems turned up"
            raise ConfigError(f"task.options.size: {options.size} asked for, {found}; ask for fewer, or 0 for all")
    return deals.values()


def _join_at_random(hand: Hand, operators: str, rng: random.Random) -> int | None:
    values = list(hand)
    while len(values) > 1:
        left = values.pop(rng.randrange(len(values)))
        right = values.pop(rng.randrange(len(values)))
        value = _apply(rng.choice(operators), left, right)
        if value is None:
            return None
        values.append(value)
    return values[0]


def _read_deals(source: str) -> Iterator[Deal]:
    """The rows of a data set, in its order."""
    rows = read_columns(source, ("target", "nums"), instead="generated")
    return (Deal(tuple(map(_integer, hand)), _integer(target)) for target, hand in rows)


def _integer(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise UserError(f"task.options.source: a target or number is {value}; all must be integers")
    return int(value)


def _unique(deals: Iterable[Deal]) -> list[Deal]:
    """The deals without those that only reorder an earlier one's numbers."""
    first: dict[str, Deal] = {}
    for deal in deals:
        first.setdefault(deal.id, deal)
    return list(first.values())


def _check(options: Options) -> None:
    if not options.operators or not set(options.operators) <= set("+-*/"):
        raise ConfigError(f"task.options.operators: {options.operators!r} must be some of + - * /")
    for low, high in (("numbers_min", "numbers_max"), ("smallest", "largest"), ("target_min", "target_max")):
        if getattr(options, low) > getattr(options, high):
            least, most = getattr(options, low), getattr(options, high)
            raise ConfigError(f"task.options.{low}: {least} must not exceed task.options.{high} = {most}")
