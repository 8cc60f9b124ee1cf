"""The table of before and after, and the picture of the learning curve."""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from nemo_r3 import report
from nemo_r3.errors import UserError


def rate(value: float | None, n: int = 400) -> dict[str, float | int | None]:
    return {"value": value, "low": (value or 0.0) - 0.04, "high": (value or 0.9) + 0.04, "n": n}


def scores(first: float, second: float | None, both: float, failures: int = 312) -> dict:
    return {
        "first_try": {"sampled": rate(first), "greedy": rate(first + 0.01)},
        "retry_success_fixed": {"sampled": rate(second, failures), "greedy": rate(second, failures)},
        "retry_success_donor": {"sampled": rate(0.05, failures)},
        "reflection_solves": {"sampled": rate(second, failures), "greedy": rate(second, failures)},
        "within_two": {"sampled": rate(both), "greedy": rate(both + 0.02)},
        "within_two_resampled": {"sampled": rate(both - 0.1)},
    }


def changes(first: float, second: float, both: float) -> dict:
    found = scores(first, second, both)
    return {name: {"sampled": found[name]["sampled"]} for name in ("first_try", "retry_success_fixed", "within_two")}


GOLDEN = """\
                           sampled                                 change        greedy          n
──────────────────────────────────────────────────────────────────────────────────────────────────
first try                  0.22 [0.18, 0.26] → 0.31 [0.27, 0.35]   -0.09 ±0.04   0.23 → 0.32   400
second try on a failure    0.22 [0.18, 0.26] → 0.70 [0.66, 0.74]   +0.48 ±0.04   0.22 → 0.70   312
another's reflection       0.05 [0.01, 0.09] → 0.05 [0.01, 0.09]   -             - → -         312
reflection as the answer   0.22 [0.18, 0.26] → 0.70 [0.66, 0.74]   -             0.22 → 0.70   312
within two tries           0.40 [0.36, 0.44] → 0.79 [0.75, 0.83]   +0.39 ±0.04   0.42 → 0.81   400
within two, resampled      0.30 [0.26, 0.34] → 0.69 [0.65, 0.73]   -             - → -         400
Share of n held-out problems, [95 % interval]; change: when sampled, ± half the 95 % interval of the
paired difference. Second try and reflection are measured on the starting model's own failures, the
same ones before and after. Another's reflection: a second try that reads the reflection on another
failure. Resampled: another first answer instead of a reflection and a retry."""

UNFINISHED = """\
                           sampled                 change   greedy       n
──────────────────────────────────────────────────────────────────────────
first try                  0.22 [0.18, 0.26] → -   -        0.23 → -   400
second try on a failure    - → -                   -        - → -        -
another's reflection       0.05 [0.01, 0.09] → -   -        - → -      312
reflection as the answer   - → -                   -        - → -        -
within two tries           0.40 [0.36, 0.44] → -   -        0.42 → -   400
within two, resampled      0.30 [0.26, 0.34] → -   -        - → -      400
Share of n held-out problems, [95 % interval]; change: when sampled, ± half the 95 % interval of the
paired difference. Second try and reflection are measured on the starting model's own failures, the
same ones before and after. Another's reflection: a second try that reads the reflection on another
failure. Resampled: another first answer instead of a reflection and a retry."""


SUMMARY = {
    "before": scores(0.22, 0.22, 0.4),
    "after": scores(0.31, 0.7, 0.79),
    "difference": changes(-0.09, 0.48, 0.39),
}


def test_table() -> None:
    text = report.table(SUMMARY | {"seconds": {}})
    assert text == GOLDEN
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_table_of_what_was_not_measured(unknown: float | None) -> None:
    assert report.table({"before": scores(0.22, unknown, 0.4)}) == UNFINISHED


def test_a_damaged_table_is_named() -> None:
    lost = {"first_try": {"sampled": {"value": 0.5}}}
    with pytest.raises(UserError, match="summary.json holds damaged rates"):
        report.table({"before": lost})


def test_moving_mean() -> None:
    means = report.moving_mean([1.0, math.nan, 0.0, 0.5, math.nan, math.nan, math.nan], 3)
    assert means[:6] == [1.0, 1.0, 0.5, 0.25, 0.25, 0.5]
    assert math.isnan(means[6])


def metrics_of(steps: int, kl: bool) -> list[dict[str, Any]]:
    """A run of growing success whose every third step was empty; of the other steps' groups 3 in 4 were used."""
    lines = []
    for step in range(1, steps + 1):
        empty = step % 3 == 0
        lines.append(
            {
                "step": step,
                "loss": None if empty else 0.1,
                "grad_norm": None if empty else 1.0,
                "reward": None if empty else step / steps,
                "retry_success": None if empty else step / steps,
                "token_mult_prob_error": None if empty else 1.0,
                "groups_used": 0 if empty else 3,
                "groups_dropped": 4 if empty else 1,
                "time/update": 0.5,
                **({"kl": None if empty else 0.001 * step} if kl else {}),
            }
        )
    return lines


def pixels(picture: Path) -> tuple[int, int]:
    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures, save = [], Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@pytest.mark.parametrize(("steps", "kl"), [(60, True), (6, False), (1, True), (0, False)])
def test_curve(tmp_path: Path, saved: list[Figure], steps: int, kl: bool) -> None:
    picture = tmp_path / "curve.png"
    report.curve(metrics_of(steps, kl), picture)
    assert pixels(picture) == (1200, 500)
    success, groups, *drift = saved[0].axes
    numbers = list(range(1, steps + 1))
    rising = [math.nan if step % 3 == 0 else step / steps for step in numbers]

    dots, mean = success.lines
    assert [(line.get_marker(), line.get_linestyle()) for line in (dots, mean)] == [("o", "None"), ("None", "-")]
    np.testing.assert_array_equal(dots.get_xydata(), np.reshape([*zip(numbers, rising, strict=True)], (-1, 2)))
    np.testing.assert_array_equal(mean.get_ydata(), report.moving_mean(rising, 6 if steps == 60 else 5))

    everything, used = groups.containers
    assert [bar.get_height() for bar in everything] == [1.0] * steps
    assert [bar.get_height() for bar in used] == [0.0 if step % 3 == 0 else 0.75 for step in numbers]
    colors = {to_hex(bar.get_facecolor()) for bar in everything}, {to_hex(bar.get_facecolor()) for bar in used}
    assert colors == (({report.GREY}, {report.BLUE}) if steps else (set(), set()))

    known = [[step, 0.001 * step] for step in numbers if step % 3]
    assert [axes.lines[0].get_xydata().tolist() for axes in drift] == ([known] if kl else [])
