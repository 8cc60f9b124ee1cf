"""Slices of a run: a slice is a job from one (re)start to the next. How one ended, and whether another follows.

<run.dir>/logs/JOB.json          what must outlive a slice: faults, failures per host, progress at its start
<run.dir>/logs/JOB_RESTART/      config.yaml, health.log, rank_N.log, rank_N.exit ("code host seconds") of one slice
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from nemo_r3 import signals
from nemo_r3.actor.manifest import latest_step
from nemo_r3.config import Config, to_yaml
from nemo_r3.errors import UserError
from nemo_r3.files import lines_of, write_whole
from slurm.commands import ATTEMPTS, ask

FINISHED, REFUSED, STOPPED = 0, 2, signals.STOPPED
"""Exit codes of a recipe: done; an error that the user must fix; stopped on request, saved. Any other is a fault."""
FAULT = 1
TIMED_OUT = 124
"""Exit code of timeout(1), around the health check."""
FINE = "fine"
DISK_SETTING = "cluster.min_disk_gb"
"""Named by a node's health check if the run directory has less room."""
HOST_FAILURES = 2
"""A host with this many failures is excluded."""
IDLE_SLICES = 2
"""This many slices in a row without a checkpoint or mined shard end the job."""
NOT_THE_HOSTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)
"""Signals from Slurm, train.sh, a person and our own watchdog: dying of one says nothing about the host."""
DEVICE_ERROR = re.compile(
    "(?:CUDA error|Cuda failure).*(ECC error|NVLink error|busy or unavailable|no CUDA-capable device|unknown error|"
    "system not yet initialized|hardware error)"
)
"""Errors of a GPU itself, not of a program, in the words of CUDA and (after "Cuda failure") NCCL."""
ERROR_LINE = re.compile(r"(\[rank ?\d+\]:? ?)?(error: |([a-zA-Z_]\w*\.)*[A-Z]\w*(Error|Exception|Interrupt)\b)")


@dataclass(frozen=True)
class Record:
    """The content of a job's `JOB.json`."""

    faults: int = 0  # slices that ended in a fault since the run last made progress
    idle: int = 0  # slices in a row that were stopped without progress
    progress: tuple[int, int] = (0, 0)  # step of the newest checkpoint, mined shards: when the slice began
    hosts: dict[str, int] = field(default_factory=dict)  # failures by host since the run last made progress


@dataclass(frozen=True)
class End:
    """How a slice ended: its code, why in one line, and the hosts to blame."""

    code: int
    cause: str = ""
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What follows from a slice's end: the record to keep, whether to requeue the job, and why."""

    record: Record
    requeue: bool
    reason: str


def logs_of(config: Config, job: str, restarts: int) -> Path:
    """A slice's log directory."""
    return Path(config.run.dir, "logs", f"{job}_{restarts}")


def begin(config: Config, job: str, restarts: int) -> None:
    """Makes the log directory, and records the slice's settings and where the run stands.

    Raises:
        UserError: the run directory cannot be written.
    """
    logs = logs_of(config, job, restarts)
    try:
        logs.mkdir(parents=True, exist_ok=True)
        write_whole(logs / "config.yaml", to_yaml(config))  # for `end`: the user may edit the file meanwhile
        write_record(config, job, replace(read_record(config, job), progress=progress_of(config)))
    except OSError as error:
        raise UserError(f"run.dir: cannot write {config.run.dir} ({error.strerror})") from error


def end(config: Config, environ: Mapping[str, str], code: int) -> int:
    """Says how a slice ended, and requeues the job if that helps.

    Returns:
        The batch script's exit code.
    """
    job, restarts = environ["SLURM_JOB_ID"], int(environ.get("SLURM_RESTART_COUNT") or 0)
    hosts = ask("scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"], attempts=ATTEMPTS).split()
    ended = read_end(logs_of(config, job, restarts), code, hosts, config.cluster.health_minutes)
    what = f"slice {restarts} of job {job}: {ended.cause}"
    state = state_of(job)
    if state != "RUNNING":  # cancelled, preempted, a node lost
        print(f"{what}; the job is {state}: Slurm is ending it, and decides whether it runs again", flush=True)
        return ended.code
    verdict = decide(config, read_record(config, job), ended, progress_of(config))
    try:
        write_record(config, job, verdict.record)
    except OSError as error:
        if verdict.requeue:  # without a record faults would not be counted
            reason = f"not requeued: cannot write {_file(config, job)} ({error.strerror}); fix that and submit again"
            verdict = replace(verdict, requeue=False, reason=reason)
    print(f"{what}; {verdict.reason}", flush=True)
    if verdict.requeue:
        requeue(job, [host for host, failures in verdict.record.hosts.items() if failures >= HOST_FAILURES])
    return ended.code


def state_of(job: str) -> str:
    """The job's state; RUNNING if Slurm does not answer, because one requeue too many does less harm than none."""
    try:
        return ask("squeue", "--noheader", f"--jobs={job}", "--format=%T", attempts=ATTEMPTS).strip()
    except UserError as error:
        print(f"{error}; going on as if the job were still running", file=sys.stderr, flush=True)
        return "RUNNING"


def read_end(logs: Path, code: int, hosts: list[str], health_minutes: int) -> End:
    """How a slice ended. srun's code mixes those of all ranks, so the first rank that failed is what counts.

    Args:
        logs: the slice's log directory.
        code: what srun returned, for the health check or for the ranks.
        hosts: of the job.
        health_minutes: the health check's limit.
    """
    if code == FINISHED:
        return End(FINISHED, "finished")
    return _failed_check(logs, code, hosts, health_minutes) or _first_failure(logs, code)


def _failed_check(logs: Path, code: int, hosts: list[str], health_minutes: int) -> End | None:
    """The end of a slice whose nodes are not fit; None if they are."""
    late = f"the health check took longer than cluster.health_minutes={health_minutes}" if code == TIMED_OUT else ""
    answers = dict(line.split(": ", 1) for line in lines_of(logs / "health.log") if ": " in line)
    if not answers:
        silent = late or "no node answered the health check"
        return End(FAULT, f"{silent} (cluster.setup, cluster.container?); see the lines above")
    causes = {host: answers.get(host, late or "no answer to the health check") for host in hosts}
    sick = {host: cause for host, cause in causes.items() if cause != FINE}
    if not sick:
        return None
    # a full disk is no node's own, since they share it, nor is another fault that all of several nodes have
    own = tuple(host for host, cause in sick.items() if any(DISK_SETTING not in part for part in cause.split("; ")))
    blamed = own if len(own) < len(hosts) or len(hosts) == 1 else ()
    return End(FAULT, "; ".join(f"node {host}: {cause}" for host, cause in sick.items()), blamed)


def _first_failure(logs: Path, code: int) -> End:
    """The end of a slice whose ranks ran: that of the first one that failed, if any says so."""
    failed = sorted(rank for rank in _ended_ranks(logs) if rank.code)
    if not failed and code == STOPPED:
        return End(STOPPED, "stopped on request before the ranks began")
    if not failed:
        return End(FAULT, f"srun ended with code {code} and no rank said why; see the lines above")
    first, *others = failed
    if first.code == STOPPED:
        return End(STOPPED, "stopped on request")
    trouble = _host_trouble(first)
    shared = trouble and any(_host_trouble(other) == trouble for other in others if other.host != first.host)
    blamed = (first.host,) if trouble and not shared else ()
    return End(first.code, f"rank {first.rank} on {first.host} {_said(first)}", blamed)


def decide(config: Config, record: Record, ended: End, progress: tuple[int, int]) -> Verdict:
    """Whether a job gets another slice. Faults and failures of hosts are counted since the last progress."""
    if progress != record.progress:
        record = replace(record, faults=0, idle=0, hosts={})
    if ended.code == FINISHED:
        return Verdict(replace(record, idle=0), False, "done")
    if ended.code == REFUSED:
        return Verdict(record, False, "not requeued: fix that and submit again")
    if ended.code == STOPPED:
        if progress == record.progress:
            record = replace(record, idle=record.idle + 1)
        if record.idle < IDLE_SLICES:
            return Verdict(record, True, "requeued")
        return Verdict(
            record,
            False,
            f"not requeued: {record.idle} slices in a row made no checkpoint; the time limit is too short for a step "
            f"and its save, cluster.signal_seconds={config.cluster.signal_seconds} before it: raise --time "
            "(cluster.time_minutes)",
        )
    hosts = record.hosts | {host: record.hosts.get(host, 0) + 1 for host in ended.hosts}
    record, limit = replace(record, faults=record.faults + 1, hosts=hosts), config.cluster.max_requeues
    if record.faults > limit:
        return Verdict(record, False, f"not requeued: cluster.max_requeues={limit} is used up")
    return Verdict(record, True, f"requeued: fault {record.faults} of {limit} allowed (cluster.max_requeues)")


def requeue(job: str, bad_hosts: list[str]) -> None:
    """Puts the job back in the queue, without hosts that failed repeatedly."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # requeueing ends this script, which must exclude the hosts first
    ask("scontrol", "requeue", job, attempts=ATTEMPTS)
    if bad_hosts:  # added to those of --exclude; Slurm lets only a pending job change the list
        shown = re.search(r"\bExcNodeList=(\S+)", ask("scontrol", "show", "job", job, attempts=ATTEMPTS))
        others = [shown[1]] if shown and shown[1] != "(null)" else []
        excluded = f"ExcNodeList={','.join([*others, *bad_hosts])}"
        ask("scontrol", "update", f"jobid={job}", excluded, attempts=ATTEMPTS)
        print(f"excluded, {HOST_FAILURES} failures or more: {', '.join(bad_hosts)}", flush=True)


def progress_of(config: Config) -> tuple[int, int]:
    """The newest complete checkpoint's step, and how many shards of the failure bank are mined."""
    shards = Path(config.failures.path).glob("shard_*.jsonl")
    return latest_step(Path(config.run.dir, "checkpoints")), len(list(shards))


def read_record(config: Config, job: str) -> Record:
    """A job's record; a new one if there is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        fields = json.loads(_file(config, job).read_text())
        return Record(**fields | {"progress": tuple(fields["progress"])})
    except FileNotFoundError:
        return Record()
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{_file(config, job)} is damaged ({error}); remove it: it only counts faults") from error


def write_record(config: Config, job: str, record: Record) -> None:
    """Writes a job's record, whole."""
    write_whole(_file(config, job), json.dumps(asdict(record)) + "\n")


def _file(config: Config, job: str) -> Path:
    return Path(config.run.dir, "logs", f"{job}.json")


class _EndedRank(NamedTuple):
    """A rank that ended by itself or was killed alone; the earlier one is the lesser."""

    at: float
    rank: int
    code: int
    host: str
    log: Path


def _ended_ranks(logs: Path) -> Iterator[_EndedRank]:
    for file in logs.glob("rank_*.exit"):
        if len(words := file.read_text().split()) == 3:
            rank = int(file.stem.removeprefix("rank_"))
            yield _EndedRank(float(words[2]), rank, int(words[0]), words[1], file.with_suffix(".log"))


def _host_trouble(rank: _EndedRank) -> str:
    """What a rank died of, if a broken host may have caused it: a signal or a GPU's own error; otherwise empty."""
    if number := _signal(rank.code):
        return "" if number in NOT_THE_HOSTS else number.name
    return next((match[1] for line in lines_of(rank.log) if (match := DEVICE_ERROR.search(line))), "")


def _signal(code: int) -> signal.Signals | None:
    return signal.Signals(code - 128) if code - 128 in [*signal.Signals] else None


def _said(rank: _EndedRank) -> str:
    """What a rank died of: a signal, or the first error in its log."""
    if number := _signal(rank.code):
        return f"was killed by signal {number.value} ({number.name})"
    said = next((line for line in lines_of(rank.log) if ERROR_LINE.match(line)), "its log names no error")
    return f"ended with code {rank.code}: {said} ({rank.log})"
