"""A chain of Slurm jobs: their batch scripts, their submission by submitit, and what became of them.

<run.dir>/chain/chain.json          stages and their jobs
                STAGE.code          a stage's exit code, once it has ended
                jobs/JOB_0_log.out  what its job printed, beside submitit's script and pickles
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from nemo_r3.config import Config
from nemo_r3.errors import ConfigError, UserError
from nemo_r3.files import lines_of
from slurm.commands import ask
from slurm.job import sbatch_options
from slurm.slices import STOPPED
from slurm.stage import Stage

PYTHON = f"exec {shlex.quote(sys.executable)}"
"""Replaces the batch shell, so that Slurm's signals reach the stage, which passes them on to train.sh."""
TO_REPOSITORY = 'cd "$SLURM_SUBMIT_DIR" || exit 2'
"""Where the stage's code is; cluster.options=[--chdir=...] starts jobs elsewhere."""


@dataclass(frozen=True)
class JobArray:
    """A stage at every point of the sweep: a job array, or a single job."""

    stages: tuple[Stage, ...]  # one for each point, or a single one that all points share
    config: Config  # what each of the jobs asks of Slurm

    @property
    def recipe(self) -> str:
        """The stages' recipe."""
        return self.stages[0].recipe


def folder_of(run_dir: Path) -> Path:
    """The directory of a run's chain."""
    return (run_dir / "chain").absolute()


def parameters(array: JobArray, before: JobArray | None, job: str) -> dict[str, Any]:
    """submitit's parameters for an array, which starts when the one before, of the given job id, has succeeded.

    Raises:
        ConfigError: `cluster` has something that a chain cannot submit.
    """
    config = array.config
    if not config.cluster.time_minutes:
        raise ConfigError(f"stage {array.recipe}: cluster.time_minutes: the jobs of a chain need a time limit")
    asked: dict[str, Any] = dict(sbatch_options(config))
    asked |= {"job-name": f"{array.stages[0].folder.parent.name}-{array.recipe}", "requeue": True}
    if before is not None:
        # aftercorr: each element waits for its counterpart
        kind = "aftercorr" if len(array.stages) == len(before.stages) > 1 else "afterok"
        asked |= {"dependency": f"{kind}:{job}", "kill-on-invalid-dep": "yes"}
    for option in config.cluster.options:
        name, equals, value = option.partition("=")
        if not name.startswith("--"):
            raise ConfigError(f"cluster.options: a chain takes --name and --name=value, got {option}")
        asked[name.removeprefix("--")] = value if equals else True
    for name, value in {**asked, "output": array.stages[0].folder}.items():
        if "\n" in f"{name}{value}":
            raise ConfigError(
                f"stage {array.recipe}: --{name}={str(value)!r} has a line break, and the batch script would run what "
                "comes after it (YAML's | and > end a value with one)"
            )
    return {
        "use_srun": False,
        "setup": [TO_REPOSITORY],
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": {name.replace("-", "_"): value for name, value in asked.items()},
    }


def batch_scripts(arrays: Sequence[JobArray]) -> str:
    """The batch scripts that `submit` would write, except for the jobs' ids."""
    scripts, before = [], None
    for array in arrays:
        settings = parameters(array, before, f"{before.recipe.upper()}_JOB" if before else "")
        jobs = array.stages[0].folder / "jobs"
        command = f"{PYTHON} -u -m submitit.core._submit {shlex.quote(str(jobs))}"
        count = len(array.stages) if len(array.stages) > 1 else None
        scripts += [
            f"# --- {shlex.join(['slurm/train.sh', *stage.argv])}   RECIPE={array.recipe}" for stage in array.stages
        ]
        scripts.append(_make_sbatch_string(command, jobs, map_count=count, **settings))
        before = array
    return "\n".join(scripts)


def submit(arrays: Sequence[JobArray]) -> str:
    """Submits a chain; returns what was submitted, in words.

    Raises:
        ConfigError: `cluster` has something that a chain cannot submit.
        UserError: there is no sbatch, an earlier chain is still active there, Slurm refuses a job, or the run directory
            cannot be written; then nothing stays submitted.
    """
    folder = arrays[0].stages[0].folder
    submitted: list[tuple[Stage, str]] = []
    batch_scripts(arrays)  # what it refuses is refused before anything is submitted
    ask("sbatch", "--version")  # submitit looks for srun alone
    refuse_another(folder)
    before, last = None, ""
    try:
        for array in arrays:
            executor = SlurmExecutor(folder / "jobs", python=PYTHON)
            executor.update_parameters(**parameters(array, before, last))
            with redirect_stderr(StringIO()):  # submitit prints what it raises
                jobs = executor.submit_array(array.stages)
            submitted += [(stage, job.job_id) for stage, job in zip(array.stages, jobs, strict=True)]
            before, last = array, jobs[0].job_id.partition("_")[0]
        record(folder, submitted)
    except (FailedJobError, FailedSubmissionError, RuntimeError) as error:  # the last: there is no srun
        left = _take_back([job for _, job in submitted])
        raise UserError(f"Slurm refused {array.recipe}: {' '.join(str(error).split())}{left}") from error
    except OSError as error:
        left = _take_back([job for _, job in submitted])
        raise UserError(f"run.dir: cannot write {error.filename or folder} ({error.strerror}){left}") from error
    return "\n".join(f"{stage.name}: job {job}" for stage, job in submitted)


def _take_back(jobs: Sequence[str]) -> str:
    """Cancels jobs of a chain that is incomplete; says which are left, if Slurm refuses that too."""
    try:
        if jobs:
            ask("scancel", *jobs)
    except UserError as error:
        return f"; cancel {' '.join(jobs)} yourself: {error}"
    return ""


def refuse_another(folder: Path) -> None:
    """Refuses a run directory whose chain is still active.

    Raises:
        UserError: its jobs are in the queue.
    """
    jobs = {job for _, job in _read(folder) if job} if _file(folder).exists() else set()
    if jobs and (active := _queue().keys() & jobs):
        raise UserError(
            f"{folder} has a chain under way (jobs {', '.join(sorted(active))}): "
            f"wait for it, or `python -m slurm.launch cancel {folder.parent}`"
        )


def record(folder: Path, submitted: Sequence[tuple[Stage, str]]) -> None:
    """Writes down a new chain; of the one before, only the jobs' logs stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.code"):
        file.unlink()
    rows = [{"recipe": s.recipe, "point": s.point, "argv": s.argv, "job": job} for s, job in submitted]
    _file(folder).write_text(json.dumps(rows, indent=1) + "\n")


def status(run_dir: Path) -> str:
    """What became of each stage, one line each.

    Raises:
        UserError: there is no chain.
    """
    chain, rows, failed = _read(folder_of(run_dir)), [], dict[str, str]()
    queue = _queue() if any(job for _, job in chain) else {}
    for stage, job in chain:
        state = queue.get(job) or _outcome(stage, job, failed.get(stage.point) or failed.get(""))
        if job not in queue and stage.ended() != 0:
            failed.setdefault(stage.point, stage.recipe)
        rows.append((stage.name, job, state))
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}}  {job:>8}  {state}" for name, job, state in rows)


def _outcome(stage: Stage, job: str, failed: str | None) -> str:
    """How a stage ended whose job is not in the queue; `failed` is the earlier stage that did not succeed, if any."""
    code = stage.ended()
    if code == 0:
        return "done"
    log = stage.folder / "jobs" / f"{job}_0_log.out"
    if code is None:
        if failed:
            return f"cancelled: {failed} did not succeed"
        if not job:
            return "did not run"
        if not log.exists():
            return "ended by Slurm: cancelled before it began"
        return (
            "ended by Slurm: cancelled, out of time or out of memory, or its end could not be written here; see "
            f"{log} and `sacct --jobs={job}`"
        )
    said = [line for line in lines_of(log) if line.startswith(("slice ", "error: "))]
    how = f"{'stopped' if code == STOPPED else 'failed'} with code {code}"
    return f"{how}: {said[-1] if said else 'see its output'}" + (f" ({log})" if job else "")


def cancel(run_dir: Path) -> str:
    """Cancels the stages that have not ended; returns which, in words.

    Raises:
        UserError: there is no chain.
    """
    chain, queue = _read(folder_of(run_dir)), _queue()
    active = [job for _, job in chain if job in queue]
    if not active:
        return "nothing to cancel: no job of the chain is in the queue"
    ask("scancel", *active)
    return f"cancelled: {', '.join(active)}"


def _queue() -> dict[str, str]:
    """The user's jobs that have not ended, by id, each with its state in words."""
    rows = [
        line.split("|") for line in ask("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%R").splitlines()
    ]
    return {job: f"{state.lower()} {where}" for job, state, where in rows}


def _read(folder: Path) -> list[tuple[Stage, str]]:
    try:
        rows = json.loads(_file(folder).read_text())
        return [(Stage(row["recipe"], row["point"], tuple(row["argv"]), folder), row["job"]) for row in rows]
    except FileNotFoundError:
        raise UserError(f"{folder.parent} has no chain (no {_file(folder)})") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{_file(folder)} is damaged ({error})") from error


def _file(folder: Path) -> Path:
    return folder / "chain.json"
