"""A run's results for people: the table of before and after, and a picture of the learning curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_r3.errors import UserError, describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = {
    "first_try": "first try",
    "retry_success_fixed": "second try on a failure",
    "retry_success_donor": "another's reflection",
    "reflection_solves": "reflection as the answer",
    "within_two": "within two tries",
    "within_two_resampled": "within two, resampled",
}
HEADINGS = ("", "sampled", "change", "greedy", "n")
WHEN = ("before", "after")
NOTE = (
    "Share of n held-out problems, [95 % interval]; change: when sampled, ± half the 95 % interval of the\n"
    "paired difference. Second try and reflection are measured on the starting model's own failures, the\n"
    "same ones before and after. Another's reflection: a second try that reads the reflection on another\n"
    "failure. Resampled: another first answer instead of a reflection and a retry."
)
NONE = "-"

INK, GRID = "#333333", "#e4e4e4"
BLUE, ORANGE, GREY = "#1f6fb2", "#d9730d", "#c9ced6"


def table(summary: Mapping[str, Any]) -> str:
    """The rates in summary.json before and after training, as plain text; "-" if missing."""
    rows = [HEADINGS, *rates(summary)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *lines = (
        "   ".join([*map(str.ljust, row[:-1], widths), row[-1].rjust(widths[-1])])  # the last column is a number
        for row in rows
    )
    return "\n".join([head, "─" * len(head), *lines, NOTE])


def rates(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table's cells under HEADINGS, one tuple per row: sampled and greedy are before -> after.

    Raises:
        UserError: the summary holds something else.
    """
    try:
        return [_cells(summary, key, name) for key, name in ROWS.items()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"summary.json holds damaged rates ({describe(error)}); remove it and run recipes.evaluate again"
        ) from error


def _cells(summary: Mapping[str, Any], key: str, name: str) -> tuple[str, ...]:
    sampled, greedy = ([_rate(summary, when, key, mode) for when in WHEN] for mode in ("sampled", "greedy"))
    counts = dict.fromkeys(str(rate["n"]) for rate in (*sampled, *greedy) if rate)
    with_intervals = " → ".join(_with_interval(rate) for rate in sampled)
    alone = " → ".join(f"{rate['value']:.2f}" if rate else NONE for rate in greedy)
    change = _with_margin(_rate(summary, "difference", key, "sampled"))
    return name, with_intervals, change, alone, " / ".join(counts) or NONE


def _rate(summary: Mapping[str, Any], when: str, key: str, mode: str) -> Mapping[str, Any] | None:
    """One {value, low, high, n}, or None where nothing was measured."""
    rate = summary.get(when, {}).get(key, {}).get(mode)
    return rate if rate and rate["value"] is not None and not math.isnan(rate["value"]) else None


def _with_interval(rate: Mapping[str, Any] | None) -> str:
    return f"{rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]" if rate else NONE


def _with_margin(change: Mapping[str, Any] | None) -> str:
    return f"{change['value']:+.2f} ±{(change['high'] - change['low']) / 2:.2f}" if change else NONE


def curve(metrics: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draws the learning curve of a run's metrics: retry success, how its groups were used, and the KL if there is one.

    `out`, in the run directory, becomes a PNG of 1200 x 500 pixels.

    Raises:
        OSError: it cannot be written.
    """
    # matplotlib takes a second to import, and only this function needs it
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line["step"] for line in metrics]
    kls = _column(metrics, "kl")
    has_kl = any(value and not math.isnan(value) for value in kls)
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(out.resolve().parent.name, x=0.01, ha="left", fontsize=14, color=INK, weight="bold")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.8, 1))
    _draw_success(figure.add_subplot(grid[:, 0]), steps, _column(metrics, "retry_success"))
    groups = figure.add_subplot(grid[0, 1] if has_kl else grid[:, 1])
    _draw_groups(groups, steps, _column(metrics, "groups_used"), _column(metrics, "groups_dropped"))
    if has_kl:
        _draw_kl(figure.add_subplot(grid[1, 1]), steps, kls)
    figure.savefig(out, format="png")


def _column(metrics: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """[steps] one metric; NaN for steps that lack it."""
    values = [line.get(name) for line in metrics]
    return [math.nan if value is None else float(value) for value in values]


def _draw_success(axes: Axes, steps: Sequence[int], values: Sequence[float]) -> None:
    window = window_of(len(steps))
    _dress(axes, "retry success on failures, per training step", steps)
    axes.plot(steps, values, "o", color=BLUE, markersize=4, alpha=0.35, markeredgewidth=0, label="step")
    axes.plot(steps, moving_mean(values, window), color=BLUE, linewidth=2.5, label=f"mean of the last {window} steps")
    axes.set_ylim(0, 1)
    axes.legend(loc="upper left", frameon=False, labelcolor=INK)


def window_of(steps: int) -> int:
    """Over how many steps a learning curve of `steps` is averaged."""
    return min(50, max(5, steps // 10))


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """[steps] the mean of each value and up to `window` - 1 before it, without NaN; NaN if none is left."""
    means = []
    for end in range(1, len(values) + 1):
        known = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        means.append(sum(known) / len(known) if known else math.nan)
    return means


def _draw_groups(axes: Axes, steps: Sequence[int], used: Sequence[float], dropped: Sequence[float]) -> None:
    """The share of each step's groups that were used, on top of a grey bar for all groups."""
    _dress(axes, "groups used (blue) and dropped (grey)", steps)
    totals = [mine + other for mine, other in zip(used, dropped, strict=True)]
    axes.bar(steps, [float(total > 0) for total in totals], 1.0, color=GREY)
    axes.bar(steps, [mine / total if total else 0.0 for mine, total in zip(used, totals, strict=True)], 1.0, color=BLUE)
    axes.set_ylim(0, 1)


def _draw_kl(axes: Axes, steps: Sequence[int], kls: Sequence[float]) -> None:
    _dress(axes, "KL to the starting model", steps)
    known = [(step, value) for step, value in zip(steps, kls, strict=True) if not math.isnan(value)]
    axes.plot(*zip(*known, strict=True), color=ORANGE, linewidth=1.5)
    axes.set_ylim(bottom=0)


def _dress(axes: Axes, title: str, steps: Sequence[int]) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("step", color=INK)
    axes.set_xlim(0.5, max(steps, default=1) + 0.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
