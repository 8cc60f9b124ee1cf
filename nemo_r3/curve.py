"""`draw`: a picture of a run's learning curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_r3.series import column, moving_mean, window_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GRID = "#333333", "#e4e4e4"
BLUE, ORANGE, GREY = "#1f6fb2", "#d9730d", "#c9ced6"


def draw(metrics: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draws the learning curve of a run's metrics: retry success, how its groups were used, and the KL if there is one.

    Where there are measurements on held-out problems, their second try is beside retry success.

    `out`, in the run directory, becomes a PNG of 1200 x 500 pixels.

    Raises:
        OSError: it cannot be written.
    """
    # matplotlib takes a second to import, and only this function needs it
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line["step"] for line in metrics]
    kls = _known(steps, column(metrics, "kl"))
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(out.resolve().parent.name, x=0.01, ha="left", fontsize=14, color=INK, weight="bold")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.8, 1))
    success = figure.add_subplot(grid[:, 0])
    _draw_success(success, steps, column(metrics, "retry_success"), column(metrics, "held_out/second_try"))
    groups = figure.add_subplot(grid[0, 1] if kls else grid[:, 1])
    _draw_groups(groups, steps, column(metrics, "groups_used"), column(metrics, "groups_dropped"))
    if kls:
        _draw_kl(figure.add_subplot(grid[1, 1]), steps, kls)
    figure.savefig(out, format="png")


def _draw_success(axes: Axes, steps: Sequence[int], values: Sequence[float], held_out: Sequence[float]) -> None:
    window = window_of(len(steps))
    _dress(axes, "retry success on failures, per training step", steps)
    axes.plot(steps, values, "o", color=BLUE, markersize=4, alpha=0.35, markeredgewidth=0, label="step")
    axes.plot(steps, moving_mean(values, window), color=BLUE, linewidth=2.5, label=f"mean of the last {window} steps")
    if known := _known(steps, held_out):
        axes.plot(*zip(*known, strict=True), "o-", color=ORANGE, linewidth=1.5, label="second try on held-out problems")
    axes.set_ylim(0, 1)
    axes.legend(loc="upper left", frameon=False, labelcolor=INK)


def _draw_groups(axes: Axes, steps: Sequence[int], used: Sequence[float], dropped: Sequence[float]) -> None:
    """The share of each step's groups that were used, on top of a grey bar for all groups."""
    _dress(axes, "groups used (blue) and dropped (grey)", steps)
    totals = [mine + other for mine, other in zip(used, dropped, strict=True)]
    axes.bar(steps, [float(total > 0) for total in totals], 1.0, color=GREY)
    axes.bar(steps, [mine / total if total else 0.0 for mine, total in zip(used, totals, strict=True)], 1.0, color=BLUE)
    axes.set_ylim(0, 1)


def _draw_kl(axes: Axes, steps: Sequence[int], known: Sequence[tuple[int, float]]) -> None:
    _dress(axes, "KL to the starting model", steps)
    # a dot at its end, whole on the axis, too, is all that there is to see of a single step
    axes.plot(*zip(*known, strict=True), "o-", color=ORANGE, linewidth=1.5, markersize=5, markevery=[-1], clip_on=False)
    axes.set_ylim(bottom=0)


def _known(steps: Sequence[int], values: Sequence[float]) -> list[tuple[int, float]]:
    """Steps and values, without the steps that lack one."""
    return [(step, value) for step, value in zip(steps, values, strict=True) if not math.isnan(value)]


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
