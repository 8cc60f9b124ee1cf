"""Sums of two small numbers, for language models of some hundred million parameters: see docs/small-model.md."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from nemo_r3.tasks.protocol import Wording
from nemo_r3.types import Problem

LARGEST = 12
HELD_OUT = 1 / 4
TEXTS = (
    "What is {a} + {b}?",
    "How much is {a} plus {b}?",
    "Tom has {a} apples and gets {b} more. How many apples does he have now?",
    "A box has {a} red balls and {b} blue balls. How many balls does it have?",
)
WORDING = Wording(
    task="{problem} Answer in one short sentence.",
    reflect="That is wrong. Reflect in one short sentence: what went wrong, and what is the right calculation?",
    retry="Now answer the question again.",
)


def problems(split: str) -> Iterator[Problem]:
    """Every pair of numbers from 1 to 12 in four texts; a quarter of the pairs is held out."""
    pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    random.Random(0).shuffle(pairs)
    held_out = round(HELD_OUT * len(pairs))
    for a, b in pairs[:held_out] if split == "test" else pairs[held_out:]:
        for number, text in enumerate(TEXTS):
            yield Problem(f"{a}+{b}-{number}", text.format(a=a, b=b), {"sum": a + b})


def verify(problem: Problem, text: str) -> bool:
    """Whether the last number in the text is the sum."""
    numbers = re.findall(r"\d+", text)
    return bool(numbers) and numbers[-1] == str(problem.data["sum"])
