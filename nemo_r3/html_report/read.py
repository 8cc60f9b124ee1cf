"""`read_run`: what a run directory holds, be the run unfinished or some of its files lost or cut."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_r3.config import Config, load
from nemo_r3.errors import ConfigError, UserError, in_one_line
from nemo_r3.files import json_lines, parse_json_object
from nemo_r3.series import number


@dataclass(frozen=True)
class RunFiles:
    """What was read of a run."""

    path: Path  # the run directory
    config: Config  # the settings recorded there, or else those that were given
    metrics: list[dict[str, Any]]  # metrics.jsonl, one mapping per step, in the order of steps
    rollouts: dict[int, Path]  # the files of rollouts/ by step, in the order of steps
    summary: dict[str, Any]  # summary.json; empty if there is none
    bank: dict[str, Any]  # the failure bank's bank.json; empty if there is none
    unread: list[str]  # what could not be read, for people


def read_run(config: Config) -> RunFiles:
    """Reads the run in `run.dir`, all but its rollouts; other settings count where none are recorded.

    Raises:
        UserError: the directory holds no run.
    """
    path, unread = Path(config.run.dir), list[str]()
    if not any((path / name).exists() for name in ("metrics.jsonl", "rollouts", "summary.json", "failures/bank.json")):
        raise UserError(f"run.dir: {path} holds nothing to report: no metrics, rollouts, evaluation or failure bank")
    metrics = [line for line in json_lines(path / "metrics.jsonl", unread) if math.isfinite(number(line, "step"))]
    files = {file.stem.removeprefix("step_"): file for file in (path / "rollouts").glob("step_*.jsonl")}
    rollouts = {int(name): file for name, file in files.items() if name.isdecimal()}
    config = _recorded(path / "config.yaml", unread) or config
    return RunFiles(
        path=path,
        config=config,
        metrics=sorted(metrics, key=lambda line: line["step"]),
        rollouts=dict(sorted(rollouts.items())),
        summary=_object(path / "summary.json", unread),
        bank=_object(Path(config.failures.path) / "bank.json", unread),
        unread=unread,
    )


def _recorded(file: Path, unread: list[str]) -> Config | None:
    try:
        return load([str(file)]) if file.exists() else None
    except ConfigError as error:
        unread.append(f"{in_one_line(error)}; the settings below are those of the command line")
        return None


def _object(file: Path, unread: list[str]) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else "{}"
        return parse_json_object(text, str(file))
    except (OSError, ValueError):
        unread.append(str(file))
        return {}
