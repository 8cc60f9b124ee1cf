"""`draw`: curves over a run's steps as the paths and ticks of a small SVG, which page.html dresses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 380, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 8, 22
"""Pixels around the curves."""
MOST_POINTS = 500

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A curve's name, its SVG path data, and its first and last value in words."""

    name: str
    path: str
    ends: str
    is_dots: bool  # no two of its points are joined, so that only dots show it


@dataclass(frozen=True)
class Chart:
    """A picture of some curves."""

    title: str  # what they show
    curves: list[Curve]  # those that have values
    x_ticks: list[tuple[float, str]]  # pixel and label of each tick of the steps
    y_ticks: list[tuple[float, str]]  # the same for the values


def draw(
    title: str,
    steps: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    low: float = 0.0,
    high: float = -math.inf,
    dots: str = "",
) -> Chart | None:
    """A chart of the curves that have values.

    Args:
        title: what they show.
        steps: [steps] ascending.
        curves: name -> [steps] values; NaN leaves a gap.
        low: the lower end of the axis.
        high: its upper end, unless a value is higher.
        dots: the curve that is drawn as dots.

    Returns:
        None if no curve has a value.
    """
    known = {name: values for name, values in curves.items() if any(map(math.isfinite, values))}
    if not known:
        return None
    finite = [value for values in known.values() for value in values if math.isfinite(value)]
    low, high = min(low, *finite), max(high, *finite)
    high = high if high > low else low + 1.0
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def x_of(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def curve(name: str, values: Sequence[float]) -> Curve:
        points = thinned(list(zip(steps, values, strict=True)))
        pixels = [(x_of(step), y_of(value)) if math.isfinite(value) else None for step, value in points]
        path = _path(pixels, name == dots)
        return Curve(name, path, _ends(values), is_dots="L" not in path)

    return Chart(
        title,
        [curve(name, values) for name, values in known.items()],
        [(x_of(tick), f"{tick:g}") for tick in ticks(first, last, 6) if tick == round(tick)],
        [(y_of(tick), f"{tick:g}") for tick in ticks(low, high, 4)],
    )


def thinned(points: list[Point]) -> list[Point]:
    """At most MOST_POINTS: of each stretch of the curve its lowest and highest point, so that peaks stay."""
    if len(points) <= MOST_POINTS:
        return points
    length = math.ceil(len(points) / (MOST_POINTS // 2))
    kept: list[Point] = []
    for start in range(0, len(points), length):
        stretch = [point for point in points[start : start + length] if math.isfinite(point[1])]
        if not stretch:
            kept.append(points[start])
            continue
        ends = min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])
        kept += sorted(set(ends))
    return kept


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers within the range, at equal distances of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    numbers = range(math.ceil(low / distance - 1e-9), math.floor(high / distance + 1e-9) + 1)
    return [round(number * distance, 12) for number in numbers]


def _path(points: Sequence[Point | None], dots: bool) -> str:
    """SVG path data, which starts anew after a gap. A dot is a line of no length with round ends."""
    parts, pen_down = [], False
    for point in points:
        if point is not None:
            begins = "L" if pen_down and not dots else "M"
            parts.append(f"{begins}{point[0]:.1f} {point[1]:.1f}" + ("" if begins == "L" else "h0"))
        pen_down = point is not None
    return "".join(parts)


def _ends(values: Sequence[float]) -> str:
    values = [value for value in values if math.isfinite(value)]
    return f"{values[0]:.3g} → {values[-1]:.3g}"
