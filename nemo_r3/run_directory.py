"""`RunDirectory`: the files of a run.

config.yaml  metrics.jsonl  layers.jsonl  rollouts/step_000001.jsonl  failures/*.jsonl  checkpoints/
held_out.json  summary.json  verdicts.json  evaluation.jsonl  tensorboard/  wandb/  mlflow/
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from nemo_r3 import memory, trackers, watchdog
from nemo_r3.config import Config, diff_for_resume, load, to_yaml
from nemo_r3.errors import ConfigError, UserError
from nemo_r3.files import filename_in_errors, lines_of, parse_json_object, take_lock, write_whole
from nemo_r3.progress import warn
from nemo_r3.runtime import World
from nemo_r3.types import Attempt, Group, Problem, Reflection, UpdateBatch

MEASURED = ("time/", "memory/", "speed/")
"""Prefixes of the metrics that differ between two runs of one config."""

MARKS = ("metrics.jsonl", "rollouts", "checkpoints", "summary.json", "failures/bank.json")
"""A directory with one of these holds a run."""
BEFORE_A_RUN = {"failures", "logs", "chain", "drill", "lost+found"}
"""What may be in a directory before there is a run: from Slurm's scripts, a drill or a mount point."""
NOTES = {".log", ".txt", ".out", ".err"}
"""Suffixes of files that a user may put there, such as the run's own output."""
LOGGED = (
    *("config.yaml", "metrics.jsonl", "layers.jsonl", "rollouts", "held_out.json", "curve.png", "report.html"),
    *("tensorboard", "wandb", "mlflow"),
)
"""What belongs to the steps of one training."""


class RunDirectory:
    """The files of one run. Rank 0 writes them; the other ranks only know the paths and measure time.

    Attributes:
        path: the directory.
        checkpoints: where checkpoints live.
        metrics: metrics.jsonl, one flat JSON object per step.
        layers: layers.jsonl, one flat JSON object per watched step, layer, matrix and operand.
        times: wall and CPU seconds of the phases since the last `log`, as "time/<phase>" and "time/cpu_<phase>".
        memory: GiB at the end of those phases, as `memory.measured` names them.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.path = Path(config.run.dir)
        self.checkpoints = self.path / "checkpoints"
        self.metrics, self.layers = self.path / "metrics.jsonl", self.path / "layers.jsonl"
        self.times: dict[str, float] = {}
        self.memory: dict[str, float] = {}
        self._logged_times: dict[str, float] = {}
        self._config, self._world = config, world

    def check_directory(self) -> None:
        """Checks that the directory can be written or made, which leaves nothing there; every rank calls this.

        Raises:
            UserError: it is not the directory of a run, or rank 0 cannot write there.
        """

        def write() -> None:
            try:
                self._refuse_other_contents()
                TemporaryFile(dir=next(place for place in (self.path, *self.path.parents) if place.exists())).close()
            except OSError as error:
                raise UserError(f"run.dir: cannot write to {self.path} ({error.strerror})") from error

        self._world.on_main(write)

    def _refuse_other_contents(self) -> None:
        if self.path.is_file():
            raise UserError(f"run.dir: {self.path} is a file; name a directory")
        if not self.path.exists() or any((self.path / mark).exists() for mark in MARKS):
            return
        names = [file.name for file in sorted(self.path.iterdir()) if file.suffix not in NOTES]
        if others := [name for name in names if name not in BEFORE_A_RUN and not name.startswith(".")]:
            more = ", ..." if len(others) > 3 else ""
            raise UserError(
                f"run.dir: {self.path} holds no run, but {', '.join(others[:3])}{more}: name a new directory, or one "
                "that is empty"
            )

    def open(self, resuming: bool) -> None:
        """Makes the directory.

        Steps that were logged there with other settings, and have no checkpoint, are moved into `tried_1` (or 2, ...).
        When `resuming` from a checkpoint, this run must have its settings.

        Raises:
            UserError: the directory cannot be written, or holds checkpoints of a run with other or unknown settings.
        """
        if resuming and not (self.path / "config.yaml").exists():
            raise UserError(
                f"run.dir: {self.path} has checkpoints and no config.yaml, which says what settings they have: put it "
                "back, or name another run.dir"
            )
        if resuming:
            self.refuse_other_settings()
        logged = sum(_step_of(line) is not None for line in lines_of(self.metrics))
        changed = self._changed_settings() if logged and not resuming else []
        self._world.barrier()  # everyone has read the old config
        try:
            if self._world.is_main:
                self.path.mkdir(parents=True, exist_ok=True)
                take_lock(self.path)
                if changed:
                    print(
                        f"moved the {logged} steps of other settings, which no checkpoint has, to {self._set_aside()} "
                        f"({'; '.join(changed)})",
                        flush=True,
                    )
                (self.path / "rollouts").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir: cannot write {self.path} ({error.strerror})") from error
        self._world.barrier()

    def _set_aside(self) -> Path:
        """Moves what was logged into a directory of its own, and returns that."""
        aside = next(path for number in count(1) if not (path := self.path / f"tried_{number}").exists())
        aside.mkdir()
        for name in LOGGED:
            if (self.path / name).exists():
                (self.path / name).rename(aside / name)
        return aside

    def refuse_other_settings(self) -> None:
        """Compares the settings with those of the run in this directory.

        Raises:
            UserError: a setting differs that may not change during a run.
        """
        if changed := self._changed_settings():
            raise UserError(
                f"{self.path} holds a run with other settings: {'; '.join(changed)}. "
                "Name another run.dir (train.start_from can begin it with a checkpoint of this one, or if LoRA changes "
                "model.path with an export), or give these settings their old values, which "
                f"{self.path / 'config.yaml'} has"
            )

    def _changed_settings(self) -> list[str]:
        file = self.path / "config.yaml"
        try:
            return diff_for_resume(load([str(file)]), self._config) if file.exists() else []
        except ConfigError as error:
            raise UserError(
                f"run.dir: {file} should have the settings of the run in this directory, and cannot be read: {error}; "
                "put it back, or name another run.dir"
            ) from error

    def cut_back(self, step: int) -> None:
        """Removes what was logged after `step`, so that a resumed run logs every step once.

        Writes the resolved config, too: not before, since settings that are refused must not look like the run's.
        """
        if not self._world.is_main:
            return
        write_whole(self.path / "config.yaml", to_yaml(self._config))
        if not step and (lost := len(lines_of(self.metrics))):
            again = f"the run starts again at step 1 and replaces the {lost} steps in {self.metrics}"
            warn(f"no checkpoint in {self.checkpoints}: {again}")
        before = [json.loads(line) for line in _cut(self.metrics, step)]
        _cut(self.layers, step)
        if lost := step - len(before):
            warn(f"{self.metrics} lacks {lost} of the {step} steps before")
        for file in (self.path / "rollouts").glob("step_*.jsonl"):
            if (name := file.stem.removeprefix("step_")).isdecimal() and int(name) > step:
                file.unlink()
        for metrics in before:
            _add_times(self._logged_times, metrics)
        trackers.open_all(self._config, self.path, step, before)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the wall and CPU seconds of its block to `times`, and measures the memory at its end."""
        watchdog.alive()
        memory.restart_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        spent = {f"time/{phase}": time.perf_counter() - wall, f"time/cpu_{phase}": time.process_time() - cpu}
        _add_times(self.times, spent)
        self.memory |= memory.measured(phase)

    def log(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Appends a step to metrics.jsonl, with the times since the last one, and to the trackers."""
        line = {"step": step, **_finite(metrics), **{name: round(spent, 4) for name, spent in self.times.items()}}
        line |= self.memory
        _add_times(self._logged_times, self.times)
        self.times, self.memory = {}, {}
        if not self._world.is_main:
            return
        _append(self.metrics, [line])
        trackers.log(line)

    def log_layers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends a step's `LayerWatch.rows` to layers.jsonl."""
        if self._world.is_main:
            _append(self.layers, [{"step": step, **_finite(row)} for row in rows])

    def log_rollouts(self, step: int, groups: Sequence[Group], batch: UpdateBatch) -> None:
        """Writes a line per reflection of a step; only a group's first line has what all of them share."""
        if not self._world.is_main:
            return
        lines = [
            _reflection(step, number, group, reflection, {"reward": reward, "advantage": round(advantage, 6)})
            for number, (group, *scores) in enumerate(zip(groups, batch.rewards, batch.advantages, strict=True))
            for reflection, reward, advantage in zip(group.reflections, *scores, strict=True)
        ]
        write_whole(self.path / "rollouts" / f"step_{step:06d}.jsonl", "".join(f"{json.dumps(it)}\n" for it in lines))

    def write_dialogues(self, sampled: Mapping[int, Sequence[Group]]) -> None:
        """Writes an evaluation's reflections, by the step of the weights, to evaluation.jsonl.

        The lines are those of `log_rollouts`, without what only training has: reward and advantage.
        """
        if self._world.is_main:
            lines = [
                _reflection(step, number, group, reflection, {})
                for step, groups in sampled.items()
                for number, group in enumerate(groups)
                for reflection in group.reflections
            ]
            write_whole(self.path / "evaluation.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))

    def write_verdicts(
        self, problems: Sequence[Problem], failures: Sequence[Attempt], verdicts: Mapping[str, Any]
    ) -> None:
        """Writes an evaluation's verdicts, and on which problems, to verdicts.json, to compare runs in pairs."""
        if self._world.is_main:
            ids = {"problems": [it.id for it in problems], "failures": [it.problem.id for it in failures]}
            write_whole(self.path / "verdicts.json", json.dumps(ids | dict(verdicts)) + "\n")

    def add_to_summary(self, **entries: Any) -> dict[str, Any]:
        """Merges entries and the seconds of this verb's phases into summary.json; None removes an entry.

        Returns:
            The whole summary.
        """
        file = self.path / "summary.json"
        summary = _read_summary(file)
        before = summary.get("seconds")
        entries["seconds"] = (before if isinstance(before, dict) else {}) | self._seconds()
        merged = {name: value for name, value in (summary | entries).items() if value is not None}
        self._world.barrier()  # everyone has read the old summary
        if self._world.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(merged, indent=1) + "\n")
        return merged

    def _seconds(self) -> dict[str, dict[str, float]]:
        """Wall and CPU seconds (of rank 0) of this verb by phase; a training's are those of all its run's steps."""
        spent = dict(self._logged_times)
        _add_times(spent, self.times)
        phases = [name.removeprefix("time/") for name in spent if not name.startswith("time/cpu_")]
        return {
            phase: {"wall": round(spent[f"time/{phase}"], 2), "cpu": round(spent.get(f"time/cpu_{phase}", 0.0), 2)}
            for phase in phases
        }


def _add_times(total: dict[str, float], line: Mapping[str, Any]) -> None:
    """Adds the times in a line of metrics.jsonl."""
    for name, spent in line.items():
        if name.startswith("time/") and isinstance(spent, float):
            total[name] = total.get(name, 0.0) + spent


def _read_summary(file: Path) -> dict[str, Any]:
    """A summary.json; an empty one if there is none or, with a warning, if it is damaged."""
    try:
        return parse_json_object(file.read_text(), str(file)) if file.exists() else {}
    except ValueError:
        warn(f"{file} is damaged, and starts again")
        return {}


def _reflection(
    step: int, number: int, group: Group, reflection: Reflection, scores: Mapping[str, float]
) -> dict[str, Any]:
    """A reflection of a group, and its retry, as a line of JSON has them."""
    return {
        "step": step,
        "group": number,
        "sample": reflection.sample,
        "problem_id": group.failure.problem.id,
        **scores,
        **(_shared(group) if reflection is group.reflections[0] else {}),
        "reflection": reflection.answer.text,
        "retry": reflection.retry.text,
        "finish_reason": reflection.answer.finish_reason,
        "retry_passed": reflection.passed,
        "retry_finish_reason": reflection.retry.finish_reason,
        "reflection_solves": reflection.solves,
        "weights_version": reflection.answer.segment.version,
        "reflection_ids": reflection.answer.segment.ids,
        "reflection_logprobs": [round(value, 6) for value in reflection.answer.segment.logprobs],
        "retry_ids": reflection.retry.segment.ids,
    }


def _shared(group: Group) -> dict[str, Any]:
    """What all reflections of a group share: problem, failed answer, and the token ids of [task][attempt]."""
    failure = group.failure
    return {"problem": failure.problem.text, "attempt": failure.answer.text, "context_ids": failure.context.ids}


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values for JSON, which has no NaN or Inf: they become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def _append(log: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Appends lines to a log; they are on the disk when this returns."""
    with filename_in_errors(log), log.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _cut(log: Path, step: int) -> list[str]:
    """Removes a log's lines after `step`, and those that are damaged; returns the others."""
    lines = [line for line in lines_of(log) if 0 < (_step_of(line) or 0) <= step]
    if log.exists():
        write_whole(log, "".join(f"{line}\n" for line in lines))
    return lines


def _step_of(line: str) -> int | None:
    """The step of a metrics line; None if it was cut short by a crash or is no such line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
