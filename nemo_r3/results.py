"""A run's results: the table of its rates before and after training, as summary.json has them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from nemo_r3.errors import UserError, describe

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


def table(summary: Mapping[str, Any]) -> str:
    """The rates in summary.json before and after training, as plain text; "-" if missing."""
    return f"{aligned([HEADINGS, *rates(summary)])}\n{NOTE}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Cells as a table in plain text; the first row is its heading, and the last column has numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *lines = ("   ".join([*map(str.ljust, row[:-1], widths), row[-1].rjust(widths[-1])]) for row in rows)
    return "\n".join([head, "─" * len(head), *lines])


def rates(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table's cells under HEADINGS, one tuple per row: sampled and greedy are before -> after.

    Raises:
        UserError: the summary holds something else.
    """
    with _damage_named():
        return [_cells(summary, key, name) for key, name in ROWS.items()]


def sampled(summary: Mapping[str, Any], key: str) -> list[float]:
    """The value of a sampled rate before and after training; NaN if missing.

    Raises:
        UserError: the summary holds something else.
    """
    with _damage_named():
        return [rate["value"] if (rate := _rate(summary, when, key, "sampled")) else math.nan for when in WHEN]


@contextmanager
def _damage_named() -> Iterator[None]:
    try:
        yield
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


def has_results(summary: Mapping[str, Any], step: int) -> bool:
    """Whether a summary holds rates after training, measured at this step and not at another."""
    return "after" in summary and summary.get("step", step) == step
