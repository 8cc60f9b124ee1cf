"""The geometry of the curves."""

from __future__ import annotations

import math

import pytest

from nemo_r3.html_report.chart import BOTTOM, HEIGHT, LEFT, MOST_POINTS, RIGHT, TOP, WIDTH, draw, thinned, ticks


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 0.0053, [0, 0.002, 0.004]),
        (1, 1.05, [1, 1.02, 1.04]),
        (3, 40, [10, 20, 30, 40]),
        (0, 1000, [0, 500, 1000]),
    ],
)
def test_ticks_are_round(low: float, high: float, found: list[float]) -> None:
    assert ticks(low, high, 4) == pytest.approx(found)


def test_a_curve_fills_the_picture_and_gaps_stay_gaps() -> None:
    chart = draw("it", [1, 2, 3, 4], {"a": [0.0, math.nan, 2.0, 1.0], "none": [math.nan] * 4})
    assert chart is not None
    (curve,) = chart.curves
    across = (WIDTH - LEFT - RIGHT) / 3
    bottom, middle = HEIGHT - BOTTOM, HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) / 2
    start, turn = f"M{LEFT:.1f} {bottom:.1f}h0", f"M{LEFT + 2 * across:.1f} {TOP:.1f}h0"
    assert curve.path == f"{start}{turn}L{WIDTH - RIGHT:.1f} {middle:.1f}"
    assert curve.ends == "0 → 1"
    assert [label for _, label in chart.x_ticks] == ["1", "2", "3", "4"]


def test_the_axis_has_both_its_ends_and_all_values() -> None:
    for values, labels in (([0.4, 0.6], ["0", "0.5", "1"]), ([-1.0, 3.0], ["-1", "0", "1", "2", "3"])):
        chart = draw("it", [1, 2], {"a": values}, low=0.0, high=1.0)
        assert chart is not None and [label for _, label in chart.y_ticks] == labels


def test_dots_are_not_joined() -> None:
    chart = draw("it", [1, 2, 3], {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]}, dots="b")
    assert chart is not None and ["L" in curve.path for curve in chart.curves] == [True, False]
    assert [curve.is_dots for curve in chart.curves] == [False, True]


def test_one_step_is_a_dot_and_nothing_is_nothing() -> None:
    chart = draw("it", [7], {"a": [0.0]})
    assert chart is not None and chart.curves[0].path.endswith("h0") and chart.curves[0].is_dots
    assert draw("it", [7], {"a": [math.nan]}) is None and draw("it", [], {"a": []}) is None


def test_a_long_curve_keeps_its_peaks_and_gaps() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[1234], points[1236] = peaks = [(1234.0, 99.0), (1236.0, -99.0)]
    points[5000:5100] = [(float(step), math.nan) for step in range(5000, 5100)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS and kept == sorted(set(kept)) and set(peaks) < set(kept)
    assert any(math.isnan(value) for _, value in kept)
