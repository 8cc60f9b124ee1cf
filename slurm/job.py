"""The part of slurm/train.sh that is in Python: `python3 -m slurm.job VERB ...`, without torch, on any host.

print CONFIG.yaml key=value ...       prints the sbatch line that fits a config
begin CONFIG.yaml key=value ...       in a job: refuses an allocation that does not fit, prints shell assignments
end CODE LOGS/config.yaml             in a job, after srun: says how the slice ended, and may requeue the job
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_r3.config import Config, check_world, load
from nemo_r3.errors import ConfigError, UserError
from nemo_r3.progress import warn
from slurm import slices

SCRIPT = "slurm/train.sh"
WAY_OUT = f"`{SCRIPT} --print CONFIG.yaml key=value ...` prints the sbatch line that fits a config"
HIDES_GPUS = {
    "SLURM_GPUS_PER_TASK": "--gpus-per-task",
    "SLURM_GPU_BIND": "--gpu-bind",
    "SLURM_NTASKS_PER_GPU": "--ntasks-per-gpu",
}
"""Variables that sbatch sets for options with which a task sees only its own GPU."""


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave the job."""

    job: str  # its id
    restarts: int  # how often it was requeued
    nodes: int  # number of nodes
    tasks: int  # tasks per node
    gpus: int | None  # GPUs per node; None if Slurm was not asked for any


def read_allocation(environ: Mapping[str, str]) -> Allocation:
    """The job's allocation, from the batch script's environment.

    Raises:
        ConfigError: ranks cannot be laid out on it.
    """
    tasks = environ["SLURM_TASKS_PER_NODE"] if "SLURM_NTASKS" in environ else "1"
    if not (even := re.fullmatch(r"(\d+)(\(x\d+\))?", tasks)):
        raise ConfigError(f"the job's tasks per node are uneven ({tasks}): ask with --nodes and --ntasks-per-node")
    for name, option in HIDES_GPUS.items():
        if environ.get(name, "none") != "none":  # --gpu-bind=none hides nothing
            raise ConfigError(f"{option} hides a rank's GPU from its neighbours: ask with --gpus-per-node instead")
    gpus = environ.get("SLURM_GPUS_ON_NODE")
    return Allocation(
        job=environ["SLURM_JOB_ID"],
        restarts=int(environ.get("SLURM_RESTART_COUNT") or 0),
        nodes=int(environ["SLURM_JOB_NUM_NODES"]),
        tasks=int(even[1]),
        gpus=int(gpus) if gpus else None,
    )


def ranks_per_node(config: Config, got: Allocation) -> int:
    """How many ranks a node runs.

    Raises:
        ConfigError: the job has not what the config or the layout wants.
    """
    cluster = config.cluster
    if got.nodes != cluster.nodes and (cluster.nodes > 1 or cluster.gpus_per_node):
        raise ConfigError(f"the job has {got.nodes} nodes, the config wants cluster.nodes={cluster.nodes}; {WAY_OUT}")
    if cluster.gpus_per_node and got.gpus not in (None, cluster.gpus_per_node):
        raise ConfigError(
            f"the job has {got.gpus} GPUs per node, the config wants cluster.gpus_per_node={cluster.gpus_per_node}; "
            + WAY_OUT
        )
    ranks = cluster.gpus_per_node or got.gpus or got.tasks
    if cluster.launcher == "srun" and got.tasks != ranks:
        wants = (
            f"cluster.gpus_per_node={ranks}" if cluster.gpus_per_node else f"a task for each of a node's {ranks} GPUs"
        )
        raise ConfigError(
            f"the job has {got.tasks} tasks per node, cluster.launcher=srun with {wants} needs "
            f"--ntasks-per-node={ranks}; {WAY_OUT}"
        )
    check_world(config, got.nodes * ranks)
    return ranks


def sbatch_options(config: Config) -> dict[str, str | int]:
    """sbatch's options for a config, except `cluster.options`; Slurm decides about those that are absent."""
    cluster = config.cluster
    asked: dict[str, str | int] = {
        "job-name": Path(config.run.dir).name,
        "partition": cluster.partition,
        "account": cluster.account,
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.gpus_per_node or 1,
        "gpus-per-node": cluster.gpus_per_node,
        "cpus-per-task": cluster.cpus_per_task,
        "mem": f"{cluster.memory_gb}G" if cluster.memory_gb else "",
        "time": cluster.time_minutes,
        "signal": f"B:USR1@{cluster.signal_seconds}",
    }
    return {name: value for name, value in asked.items() if value}


def sbatch_line(config: Config, argv: Sequence[str]) -> str:
    """The command that submits a config, safe to paste into a shell."""
    options = [f"--{name}={value}" for name, value in sbatch_options(config).items()]
    return shlex.join(["sbatch", *options, *config.cluster.options, SCRIPT, *argv])


def resource_warning(config: Config) -> str:
    """What to warn of if GPUs are asked for without cores or memory; empty if they are not."""
    cluster = config.cluster
    asked = {"cluster.cpus_per_task": cluster.cpus_per_task, "cluster.memory_gb": cluster.memory_gb}
    unasked = [f"{name}=0" for name, value in asked.items() if not value]
    if not cluster.gpus_per_node or not unasked:
        return ""
    return f"{', '.join(unasked)}: Slurm's default may be one core per rank, and memory for no more than that"


def shell_variables(config: Config, got: Allocation) -> dict[str, str | list[str]]:
    """The shell variables with which train.sh and rank.sh start the ranks.

    Raises:
        ConfigError: the allocation does not fit the config.
    """
    cluster, ranks = config.cluster, ranks_per_node(config, got)
    tasks = ranks if cluster.launcher == "srun" else 1
    step = [f"--ntasks={got.nodes * tasks}", f"--ntasks-per-node={tasks}"]
    cpus = cluster.cpus_per_task or int(os.environ.get("SLURM_CPUS_PER_TASK", "0")) * got.tasks // ranks
    if cpus:  # srun does not inherit it from sbatch
        step.append(f"--cpus-per-task={cpus * ranks // tasks}")
    logs = slices.logs_of(config, got.job, got.restarts)
    health = [logs, got.gpus or 0, f"{cluster.min_disk_gb:g}", f"{cluster.min_shm_gb:g}"]
    return {
        "LOGS": str(logs),
        "LAUNCHER": cluster.launcher,
        "RANKS_PER_NODE": str(ranks),
        "THREADS": str(cpus or 1),
        "SETUP": cluster.setup,
        "CONTAINER": _container(config, got.job),
        "NODE_STEP": [f"--ntasks={got.nodes}", "--ntasks-per-node=1"],
        "RANK_STEP": step,
        "HEALTH_MINUTES": str(cluster.health_minutes),
        "HEALTH": [str(word) for word in health],
    }


def _container(config: Config, job: str) -> list[str]:
    """srun's options; the name lets a node import the image once, for both the health check and the ranks."""
    cluster, here = config.cluster, os.getcwd()
    if not cluster.container:
        return []
    mounts = ",".join([f"{here}:{here}", *cluster.container_mounts])
    return [
        f"--container-image={cluster.container}",
        f"--container-name=nemo_r3_{job}",
        f"--container-mounts={mounts}",
        f"--container-workdir={here}",
    ]


def assignments(values: Mapping[str, str | list[str]]) -> str:
    """Shell text that sets variables and arrays to exactly these values."""
    return "".join(
        f"{name}=({shlex.join(value)})\n" if isinstance(value, list) else f"{name}={shlex.quote(value)}\n"
        for name, value in values.items()
    )


def begin(config: Config) -> None:
    """Begins a slice: makes its log directory and prints the shell assignments."""
    got = read_allocation(os.environ)
    values = shell_variables(config, got)
    slices.begin(config, got.job, got.restarts)
    ranks = got.nodes * ranks_per_node(config, got)
    print(f"{ranks} ranks on {got.nodes} nodes, restart {got.restarts}; logs: {values['LOGS']}", file=sys.stderr)
    print(assignments(values), end="")


def main(argv: Sequence[str]) -> int:
    """Runs a verb; returns its exit code."""
    verb, *rest = argv
    try:
        if verb == "print":
            config = load(rest)
            print(sbatch_line(config, rest))
            if warning := resource_warning(config):
                warn(warning)
        elif verb == "begin":
            begin(load(rest))
        elif verb == "end":
            return slices.end(load(rest[1:]), os.environ, code=int(rest[0]))
        else:
            raise UserError(f"{verb}: expected print, begin or end")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
