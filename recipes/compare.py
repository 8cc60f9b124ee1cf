"""Compares runs: what each reached on held-out problems, and the mean of those that differ in their seed alone.

python -m recipes.compare RUN_DIR ...

A directory of runs, such as a sweep's, stands for all that were trained there. Reads what training and
`recipes.evaluate` wrote, on any machine that sees it; needs no GPU.
"""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_r3 import config as configuration
from nemo_r3 import entry
from nemo_r3.config import Config
from nemo_r3.config.schema import in_words, leaves
from nemo_r3.errors import UserError
from nemo_r3.files import lines_of, read_json_object
from nemo_r3.results import NONE, aligned, has_results, sampled

USAGE = "name the directories of trained runs, or of a sweep"
SECOND_TRY = "retry_success_fixed"
MEASURES = {
    "first_try": "first try",
    SECOND_TRY: "second try",
    "within_two": "within two",
    "within_two_resampled": "resampled",
}
HEADINGS = ("", "steps", *MEASURES.values(), "gain")
UNKNOWN = (math.nan,) * (2 * len(MEASURES) + 1)
NOT_TRAINED = ("run.", "cluster.", "drill.", "failures.path")
"""Sections and a setting that say where a run is and what runs it, not what it trains."""
WIDTH = 120
"""Columns of a terminal."""
ROOM = 36
"""How many of them the settings in a row's name may take; longer ones are told below the table."""
NOTE = (
    "Sampled shares of held-out problems, before → after training (recipes.evaluate says more of each run).\n"
    "Second try: on the starting model's own failures, which differ between seeds; gain: its after minus before.\n"
    "sd: standard deviation of the runs above it."
)


@dataclass(frozen=True)
class Run:
    """What was read of a run."""

    path: Path
    config: Config
    progress: str  # how many steps, in words
    numbers: tuple[float, ...]  # see `numbers_of`; empty until its last step is evaluated


def compare(argv: Sequence[str]) -> None:
    """`python -m recipes.compare RUN_DIR ...`."""
    if not argv:
        raise UserError(USAGE)
    paths = dict.fromkeys(path for word in argv for path in runs_in(Path(word)))
    print(f"{table([read(path) for path in paths])}\n{NOTE}")


def runs_in(place: Path) -> list[Path]:
    """The directories of trained runs: the place itself, and those in it.

    Raises:
        UserError: there is none.
    """
    inner = [file.parent for file in sorted(place.glob("*/config.yaml")) if not file.parent.name.startswith("tried_")]
    if found := [*([place] if (place / "config.yaml").exists() else []), *inner]:
        return found
    raise UserError(f"{place} holds no trained run: there is no config.yaml in it or in a directory of it; {USAGE}")


def read(path: Path) -> Run:
    """Reads a run.

    Raises:
        UserError: its config.yaml or its summary.json is damaged.
    """
    config, file = configuration.load([str(path / "config.yaml")]), path / "summary.json"
    summary = read_json_object(file, "recipes.compare") if file.exists() else {}
    steps, logged = config.train.steps, len(lines_of(path / "metrics.jsonl"))
    if not has_results(summary, steps):
        return Run(path, config, f"{logged} of {steps}" if logged < steps else f"{steps}, not evaluated", ())
    try:
        return Run(path, config, str(steps), numbers_of(summary))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def numbers_of(summary: Mapping[str, Any]) -> tuple[float, ...]:
    """Each of MEASURES before and after, and how much the second try gained; NaN if nothing was measured."""
    shares = {key: sampled(summary, key) for key in MEASURES}
    before, after = shares[SECOND_TRY]
    return (*itertools.chain(*shares.values()), after - before)


def table(runs: Sequence[Run]) -> str:
    """A row for each run, and two for each group of finished ones that differ in their seed alone."""
    settings = {run.path: settings_of(run.config) for run in runs}
    first = settings[runs[0].path]
    keys = dict.fromkeys(itertools.chain(*settings.values()))
    told = [key for key in keys if any(found.get(key) != first.get(key) for found in settings.values())]
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.config.seed):
        label = "".join(f"{key}={settings[run.path].get(key, 'default')}, " for key in told)
        groups.setdefault(label, []).append(run)
    labels, below = numbered_if_long(list(groups))
    rows: list[Sequence[str]] = [HEADINGS]
    for label, group in zip(labels, groups.values(), strict=True):
        seeds = [run.config.seed for run in group]
        for seed, run in zip(seeds, group, strict=True):
            name = f"{label}seed={seed}" if seeds.count(seed) == 1 else f"{label}{run.path}"
            rows.append((name, run.progress, *cells(run.numbers or UNKNOWN)))
        rows += means(label, [run.numbers for run in group if run.numbers])
    return "\n".join([aligned(rows), *below])


def settings_of(config: Config) -> dict[str, str]:
    """In words, all settings that say what is trained, but the seed; of the task's options those that are set."""
    found = {leaf.key: leaf.of(config) for leaf in leaves(Config)}
    found |= {f"task.options.{name}": value for name, value in found.pop("task.options").items()}
    return {key: in_words(value) for key, value in found.items() if not key.startswith(("seed", *NOT_TRAINED))}


def numbered_if_long(labels: list[str]) -> tuple[list[str], list[str]]:
    """The groups' labels, and no lines; if one takes more than ROOM, numbers, and lines that tell what they stand for.

    A label ends in a comma and a space, unless it is empty.
    """
    if max(map(len, labels)) <= ROOM:
        return labels, []
    names = [f"group {number}" for number in range(1, len(labels) + 1)]
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    told = [wrap.fill(f"{name}: {label[:-2]}") for name, label in zip(names, labels, strict=True)]
    return [f"{name}, " for name in names], told


def means(label: str, runs: Sequence[Sequence[float]]) -> list[tuple[str, ...]]:
    """The rows of mean and standard deviation of the runs' numbers; none of fewer than two runs."""
    if len(runs) < 2:
        return []
    columns = list(zip(*runs, strict=True))
    centre = [statistics.fmean(column) for column in columns]
    spread = [math.nan if math.isnan(sum(column)) else statistics.stdev(column) for column in columns]
    return [(f"{label}mean of {len(runs)}", "", *cells(centre)), ("sd", "", *cells(spread, sign=""))]


def cells(numbers: Sequence[float], sign: str = "+") -> list[str]:
    """Under MEASURES and the gain; `sign` is the gain's."""
    *shares, gain = numbers
    pairs = zip(shares[::2], shares[1::2], strict=True)
    return [*(f"{shown(before)} → {shown(after)}" for before, after in pairs), shown(gain, sign)]


def shown(number: float, sign: str = "") -> str:
    """A number, or that there is none."""
    return NONE if math.isnan(number) else f"{number:{sign}.2f}"


if __name__ == "__main__":
    entry.main(compare, USAGE)
