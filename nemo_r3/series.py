"""A metric over a run's steps, from the lines of metrics.jsonl: its values, their moving mean, and its two ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

ENDS = 5
"""How many steps are averaged at the beginning and at the end, at most."""


def number(line: Mapping[str, Any], name: str) -> float:
    """A metric of a step; NaN if it is absent, null or no number."""
    value = line.get(name)
    return float(value) if isinstance(value, (int, float)) else math.nan


def column(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """[steps] a metric; NaN for steps that lack it."""
    return [number(line, name) for line in lines]


def window_of(steps: int) -> int:
    """Over how many steps a curve of `steps` is averaged."""
    return min(50, max(5, steps // 10))


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """[steps] the mean of each value and up to `window` - 1 before it, without NaN; NaN if none is left."""
    means = []
    for end in range(1, len(values) + 1):
        known = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        means.append(sum(known) / len(known) if known else math.nan)
    return means


def ends_of(steps: int) -> int:
    """How many steps to average at each end of a run: ENDS, or half of a shorter run, so that its ends do not meet."""
    return min(ENDS, steps // 2)
