"""A chain in Slurm: its batch scripts, its submission by submitit, what became of it.

<run.dir>/chain/chain.json          stages and their jobs
                STAGE.code          how a stage ended: its exit code
                jobs/JOB_0_log.out  what its job printed; beside it submitit's script and pickles
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
from slurm.commands import ask
from slurm.job import sbatch_options
from slurm.stage import Stage

PYTHON = f"exec {shlex.quote(sys.executable)}"
"""In the batch shell's place: Slurm's signals then reach the stage, which hands them on to train.sh."""


@dataclass(frozen=True)
class Step:
    """A stage at every point of the sweep: one job, or one array.

    Attributes:
        stages: one for each point; one alone where the points share it.
        config: what each of the jobs asks of Slurm.
    """

    stages: tuple[Stage, ...]
    config: Config

    @property
    def recipe(self) -> str:
        """The stages' recipe."""
        return self.stages[0].recipe


def folder_of(run_dir: Path) -> Path:
    """Where a run's chain is kept."""
    return (run_dir / "chain").absolute()


def parameters(step: Step, before: Step | None, job: str) -> dict[str, Any]:
    """submitit's parameters of a step's jobs.

    Args:
        step: what is to be submitted.
        before: the step that must have succeeded; None for the first.
        job: its job.

    Raises:
        ConfigError: `cluster` has something that a chain cannot submit.
    """
    config = step.config
    if not config.cluster.time_minutes:
        raise ConfigError(f"stage {step.recipe}: cluster.time_minutes: the jobs of a chain need a time limit")
    asked: dict[str, Any] = dict(sbatch_options(config))
    asked |= {"job-name": f"{step.stages[0].folder.parent.name}-{step.recipe}", "requeue": True}
    if before is not None:
        # of two arrays an element waits for its own in the other
        kind = "aftercorr" if len(step.stages) == len(before.stages) > 1 else "afterok"
        asked |= {"dependency": f"{kind}:{job}", "kill-on-invalid-dep": "yes"}
    for option in config.cluster.options:
        name, equals, value = option.partition("=")
        if not name.startswith("--"):
            raise ConfigError(f"cluster.options: a chain takes --name and --name=value, got {option}")
        asked[name.removeprefix("--")] = value if equals else True
    return {
        "use_srun": False,
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": {name.replace("-", "_"): value for name, value in asked.items()},
    }


def texts(steps: Sequence[Step]) -> str:
    """The batch scripts, as `submit` would write them but for the jobs' ids."""
    parts, before = [], None
    for step in steps:
        settings = parameters(step, before, f"{before.recipe.upper()}_JOB" if before else "")
        jobs = step.stages[0].folder / "jobs"
        command = f"{PYTHON} -u -m submitit.core._submit {shlex.quote(str(jobs))}"
        count = len(step.stages) if len(step.stages) > 1 else None
        parts += [
            f"# --- {shlex.join(['slurm/train.sh', *stage.argv])}   RECIPE={step.recipe}" for stage in step.stages
        ]
        parts.append(_make_sbatch_string(command, jobs, map_count=count, **settings))
        before = step
    return "\n".join(parts)


def submit(steps: Sequence[Step]) -> str:
    """Submits a chain; what was submitted, in words.

    Raises:
        ConfigError: `cluster` has something that a chain cannot submit.
        UserError: an earlier chain is under way there, or Slurm refuses a job; nothing stays submitted then.
    """
    folder = steps[0].stages[0].folder
    submitted: list[tuple[Stage, str]] = []
    texts(steps)  # what it refuses is refused before anything is submitted
    refuse_another(folder)
    before, last = None, ""
    for step in steps:
        try:
            executor = SlurmExecutor(folder / "jobs", python=PYTHON)
            executor.update_parameters(**parameters(step, before, last))
            with redirect_stderr(StringIO()):  # submitit prints what it raises
                jobs = executor.submit_array(step.stages)
        except (FailedJobError, FailedSubmissionError, RuntimeError) as error:  # the last: there is no Slurm
            if submitted:
                ask("scancel", *(job for _, job in submitted))
            raise UserError(f"Slurm refused {step.recipe}: {' '.join(str(error).split())}") from error
        submitted += [(stage, job.job_id) for stage, job in zip(step.stages, jobs, strict=True)]
        before, last = step, jobs[0].job_id.partition("_")[0]
    record(folder, submitted)
    return "\n".join(f"{stage.name}: job {job}" for stage, job in submitted)


def refuse_another(folder: Path) -> None:
    """Keeps two chains out of one run directory.

    Raises:
        UserError: jobs of the chain there are still in the queue.
    """
    jobs = {job for _, job in _read(folder) if job} if _file(folder).exists() else set()
    if jobs and (active := _queue().keys() & jobs):
        raise UserError(
            f"{folder} has a chain under way (jobs {', '.join(sorted(active))}): "
            f"wait for it, or `python -m slurm.launch cancel {folder.parent}`"
        )


def record(folder: Path, submitted: Sequence[tuple[Stage, str]]) -> None:
    """Writes down a new chain; of the one before nothing stays but its jobs' logs."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.code"):
        file.unlink()
    rows = [{"recipe": s.recipe, "point": s.point, "argv": s.argv, "job": job} for s, job in submitted]
    _file(folder).write_text(json.dumps(rows, indent=1) + "\n")


def status(run_dir: Path) -> str:
    """What became of each stage, a line each.

    Raises:
        UserError: there is no chain.
    """
    chain, lines, lost = _read(folder_of(run_dir)), [], dict[str, str]()
    queue = _queue() if any(job for _, job in chain) else {}
    for stage, job in chain:
        said = queue.get(job) or _said(stage, job, lost.get(stage.point) or lost.get(""))
        if job not in queue and stage.ended() != 0:
            lost.setdefault(stage.point, stage.recipe)
        lines.append((stage.name, job, said))
    width = max(len(name) for name, _, _ in lines)
    return "\n".join(f"{name:<{width}}  {job:>8}  {said}" for name, job, said in lines)


def _said(stage: Stage, job: str, lost: str | None) -> str:
    """Of a stage whose job is not in the queue; `lost` is the stage before it that did not succeed."""
    code = stage.ended()
    if code == 0:
        return "done"
    log = stage.folder / "jobs" / f"{job}_0_log.out"
    if code is None and lost:
        return f"cancelled: {lost} did not succeed"
    if code is None and not job:
        return "did not run"
    if code is None:
        return f"ended by Slurm: cancelled, out of time or out of memory; see {log} and `sacct --jobs={job}`"
    slices = [line for line in log.read_text().splitlines() if line.startswith("slice ")] if log.exists() else []
    return f"failed with code {code}: {slices[-1] if slices else 'see its output'}" + (f" ({log})" if job else "")


def cancel(run_dir: Path) -> str:
    """Cancels the stages that have not ended; which, in words.

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
    """The user's jobs that have not ended, each with what it does, in words."""
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
