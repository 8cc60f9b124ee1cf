"""The table of before and after."""

import math

import pytest

from nemo_r3 import results
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


LEGEND = """\
Share of n held-out problems, [95 % interval]; change: when sampled, ± half the 95 % interval of the
paired difference. Second try and reflection are measured on the starting model's own failures, the
same ones before and after. Another's reflection: a second try that reads the reflection on another
failure. Resampled: another first answer instead of a reflection and a retry."""
GOLDEN = """\
                           sampled                                 change        greedy          n
──────────────────────────────────────────────────────────────────────────────────────────────────
first try                  0.22 [0.18, 0.26] → 0.31 [0.27, 0.35]   -0.09 ±0.04   0.23 → 0.32   400
second try on a failure    0.22 [0.18, 0.26] → 0.70 [0.66, 0.74]   +0.48 ±0.04   0.22 → 0.70   312
another's reflection       0.05 [0.01, 0.09] → 0.05 [0.01, 0.09]   -             - → -         312
reflection as the answer   0.22 [0.18, 0.26] → 0.70 [0.66, 0.74]   -             0.22 → 0.70   312
within two tries           0.40 [0.36, 0.44] → 0.79 [0.75, 0.83]   +0.39 ±0.04   0.42 → 0.81   400
within two, resampled      0.30 [0.26, 0.34] → 0.69 [0.65, 0.73]   -             - → -         400
"""

UNFINISHED = """\
                           sampled                 change   greedy       n
──────────────────────────────────────────────────────────────────────────
first try                  0.22 [0.18, 0.26] → -   -        0.23 → -   400
second try on a failure    - → -                   -        - → -        -
another's reflection       0.05 [0.01, 0.09] → -   -        - → -      312
reflection as the answer   - → -                   -        - → -        -
within two tries           0.40 [0.36, 0.44] → -   -        0.42 → -   400
within two, resampled      0.30 [0.26, 0.34] → -   -        - → -      400
"""


def test_table() -> None:
    summary = {"before": scores(0.22, 0.22, 0.4), "after": scores(0.31, 0.7, 0.79)}
    text = results.table(summary | {"difference": changes(-0.09, 0.48, 0.39), "seconds": {}})
    assert text == GOLDEN + LEGEND
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_table_of_what_was_not_measured(unknown: float | None) -> None:
    assert results.table({"before": scores(0.22, unknown, 0.4)}) == UNFINISHED + LEGEND


def test_a_damaged_table_is_named() -> None:
    lost = {"first_try": {"sampled": {"value": 0.5}}}
    with pytest.raises(UserError, match="summary.json holds damaged rates"):
        results.table({"before": lost})
