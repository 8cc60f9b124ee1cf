"""The picture of what an update costs, against the number of tokens that its layout runs through the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {"shared": "tab:blue", "packed": "tab:orange", "padded": "tab:red"}
PANELS = (("group", "reflections per group (G)"), ("context", "context, tokens"))


def picture(grid: Sequence[dict[str, Any]], base: dict[str, int], path: Path) -> None:
    """Seconds per update against G and against the context's length.

    Dots are medians. Lines are the tokens of each layout, in seconds by one factor for the whole picture: what shared
    contexts took at the base point.

    Args:
        grid: measured points.
        base: the point that the panels vary: `context`, `reflection`, `group`.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    centre = next(point for point in grid if all(point[name] == value for name, value in base.items()))
    second_per_token = centre["layouts"]["shared"]["seconds"] / centre["tokens_laid"]["shared"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, (name, label) in zip(axes, PANELS, strict=True):
        varied = [p for p in grid if all(p[other] == value for other, value in base.items() if other != name)]
        varied.sort(key=lambda point: point[name])
        values = [point[name] for point in varied]
        for layout, colour in COLOURS.items():
            axis.plot(values, [p["layouts"][layout]["seconds"] for p in varied], "o", color=colour, label=layout)
            axis.plot(values, [p["tokens_laid"][layout] * second_per_token for p in varied], color=colour, alpha=0.5)
        fixed = ", ".join(f"{other} {value}" for other, value in base.items() if other != name)
        axis.set(xlabel=label, ylabel="seconds per update", title=fixed, ylim=(0, None))
    axes[0].legend(title="dots: measured, lines: by token count")
    figure.savefig(path, dpi=110)
    plt.close(figure)
