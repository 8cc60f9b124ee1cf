"""What of a run's metrics deserves a look: steps that were marked, turns that were cut, and where the time went."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_r3.config.train import TrainConfig
from nemo_r3.series import column, ends_of, number

Metrics = Sequence[Mapping[str, Any]]

MOST_NAMED = 12
SHARES = {
    "attempts_truncated": "first answers cut at their limit",
    "truncated": "reflections cut at their limit",
    "retries_truncated": "retries cut at their limit",
    "reflection_solves": "reflections that give the answer away",
}
SPEEDS = {
    "speed/rollout_tokens": "tokens sampled per second, all ranks",
    "speed/update_tflops": "TFLOP/s per rank, update",
    "speed/update_mfu": "MFU, update",
    "speed/rollout_mfu": "MFU, rollout",
}


@dataclass(frozen=True)
class Marked:
    """Steps with something in common; `steps` names the first of them."""

    what: str
    count: int
    steps: str


@dataclass(frozen=True)
class Share:
    """A share at the beginning, at the end, and where it was highest."""

    what: str
    first: float
    last: float
    highest: float
    at: int


@dataclass(frozen=True)
class Phase:
    """Wall seconds of a phase, and the steps' mean and share of them; NaN for a phase that is not a step's."""

    name: str
    seconds: float
    per_step: float
    share: float


def marked_steps(metrics: Metrics, config: TrainConfig) -> list[Marked]:
    """What steps were marked with in the log, and how often; also steps that metrics.jsonl lacks."""
    steps = [int(line["step"]) for line in metrics]
    updates = {int(line["step"]): line for line in metrics if "skipped" in line}  # null is NaN there
    warn = config.mismatch_warn
    found = {
        f"MISMATCH: token_mult_prob_error above train.mismatch_warn={warn}": [
            step for step, line in updates.items() if not number(line, "token_mult_prob_error") <= warn
        ],
        "update skipped: NaN or Inf in the gradient, or all tokens rejected": [
            step for step, line in updates.items() if number(line, "skipped") > 0
        ],
        "CONTRADICTION: the verifier accepts and rejects the same text": [
            int(line["step"]) for line in metrics if number(line, "contradictions") > 0
        ],
        "nothing to train on: no group whose rewards differ": [step for step in steps if step not in updates],
        "not in metrics.jsonl": sorted(set(range(1, max(steps, default=0))) - set(steps)),
    }
    return [Marked(what, len(those), _named(those)) for what, those in found.items()]


def shares(metrics: Metrics) -> list[Share]:
    """SHARES at both ends of the run, without those that were not measured."""
    rows = []
    for name, what in SHARES.items():
        if values := _known(metrics, name):
            at = next(int(line["step"]) for line in metrics if number(line, name) == max(values))
            count = ends_of(len(values)) or 1
            first, last = statistics.fmean(values[:count]), statistics.fmean(values[-count:])
            rows.append(Share(what, first, last, max(values), at))
    return rows


def phases(metrics: Metrics, summary: Mapping[str, Any]) -> list[Phase]:
    """Where the time went: the phases of the logged steps, then those that only summary.json has."""
    names = dict.fromkeys(key for line in metrics for key in line if key.startswith("time/"))
    walls = [name for name in names if not name.startswith("time/cpu_")]
    spent = {name.removeprefix("time/"): _known(metrics, name) for name in walls}
    whole = sum(map(sum, spent.values())) or math.nan
    of_steps = [Phase(name, sum(took), sum(took) / len(metrics), sum(took) / whole) for name, took in spent.items()]
    seconds = summary.get("seconds")
    others = seconds if isinstance(seconds, dict) else {}
    return of_steps + [
        Phase(name, number(took, "wall"), math.nan, math.nan)
        for name, took in others.items()
        if name not in spent and isinstance(took, dict)
    ]


def speeds(metrics: Metrics) -> dict[str, float]:
    """The median step's SPEEDS, by what they are."""
    known = {what: _known(metrics, name) for name, what in SPEEDS.items()}
    return {what: statistics.median(values) for what, values in known.items() if values}


def _known(metrics: Metrics, name: str) -> list[float]:
    """A metric in the steps that have it."""
    return [value for value in column(metrics, name) if not math.isnan(value)]


def _named(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:MOST_NAMED])) + (", ..." if len(steps) > MOST_NAMED else "")
