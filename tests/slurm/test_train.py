"""`sbatch slurm/train.sh` on the virtual cluster: the embedded model, two ranks on each of two nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from launch import QUICKSTART, SMALL, run

from recipes.fault_injection import untimed

pytestmark = pytest.mark.slurm

SCRIPT = "slurm/train.sh"
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")
LAYOUT = ("actor.tensor_parallel=2", "actor.pipeline_parallel=2")


def settings(bank: Path, run_dir: Path, *more: str) -> list[str]:
    return [QUICKSTART, *SMALL, *LAYOUT, f"failures.path={bank}", f"run.dir={run_dir}", "train.steps=5", *more]


@pytest.fixture(scope="module")
def by_torchrun(bank: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of the run that torchrun starts on this machine alone."""
    path = tmp_path_factory.mktemp("torchrun") / "run"
    run("train", *settings(bank, path), ranks=4)
    steps = untimed(path / "metrics.jsonl")
    assert all(abs(step["token_mult_prob_error"] - 1) < 1e-4 for step in steps), "vLLM and the actor differ"
    return steps


@pytest.mark.parametrize("launcher", ["srun", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_job_trains_as_torchrun_does(
    cluster: Cluster, bank: Path, by_torchrun: list[dict[str, Any]], tmp_path: Path, launcher: str
) -> None:
    path = tmp_path / "run dir"  # a blank in the name: everything is quoted
    job = cluster.submit(*TWO_BY_TWO, SCRIPT, *settings(bank, path, f"cluster.launcher={launcher}"))
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert untimed(path / "metrics.jsonl") == by_torchrun
    assert "step    5/5" in cluster.output(job), "rank 0's log is shown as it grows"
    logs = path / "logs" / f"{job}_0"
    assert sorted(log.name for log in logs.glob("rank_*.log")) == [f"rank_{rank}.log" for rank in range(4)]
    hosts = [(logs / f"rank_{rank}.exit").read_text().split()[:2] for rank in range(4)]
    assert hosts == [["0", "n1"], ["0", "n1"], ["0", "n2"], ["0", "n2"]]


def test_a_misfit_ends_at_once_with_both_said(cluster: Cluster, tmp_path: Path) -> None:
    wanted = ("cluster.nodes=3", "cluster.gpus_per_node=2")
    job = cluster.submit(*TWO_BY_TWO, SCRIPT, QUICKSTART, f"run.dir={tmp_path}/run", *wanted)
    assert cluster.wait(job, 60) == "FAILED"
    assert "error: the job has 2 nodes, the config wants cluster.nodes=3" in cluster.output(job)
    assert cluster.show(job)["ExitCode"] == "2:0"
    assert not (tmp_path / "run").exists()


def test_a_killed_rank_is_named_and_the_job_resumes(
    cluster: Cluster, bank: Path, by_torchrun: list[dict[str, Any]], tmp_path: Path
) -> None:
    job = cluster.submit(*TWO_BY_TWO, SCRIPT, *settings(bank, tmp_path, "train.save_every=1"))
    until(lambda: (tmp_path / "checkpoints" / "step_000001" / "manifest.json").exists(), cluster, job)
    os.kill(rank_process(job, 3), signal.SIGKILL)
    until_resumed(cluster, job, "kill -9 of a rank")
    assert json.loads((tmp_path / "logs" / f"{job}.json").read_text())["hosts"] == {"n2": 1}
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert "rank 3 on n2 was killed by signal 9 (SIGKILL); requeued: fault 1 of 3 allowed" in cluster.output(job)
    assert cluster.show(job)["Restarts"] == "1"
    assert untimed(tmp_path / "metrics.jsonl") == by_torchrun
    assert json.loads((tmp_path / "logs" / f"{job}.json").read_text())["hosts"] == {}, "what followed was progress"


def test_faults_requeue_up_to_the_cap(cluster: Cluster, tmp_path: Path) -> None:
    """Every start fails, on all nodes alike, so that no host is to blame."""
    broken = ("cluster.setup='source /nowhere/activate'", "cluster.max_requeues=1")
    job = cluster.submit(*TWO_BY_TWO, SCRIPT, QUICKSTART, f"run.dir={tmp_path}/run", *broken)
    assert cluster.wait(job, 120) == "FAILED"
    said = cluster.output(job)
    assert "/nowhere/activate: No such file or directory" in said
    assert "requeued: fault 1 of 1 allowed" in said
    assert "not requeued: cluster.max_requeues=1 is used up" in said
    assert cluster.show(job)["Restarts"] == "1"
    assert json.loads((tmp_path / "run" / "logs" / f"{job}.json").read_text())["hosts"] == {}


def test_an_unfit_node_is_named_and_in_the_end_left_out(cluster: Cluster, tmp_path: Path) -> None:
    """n2 does not see the run directory, twice; then the job runs on n1 and n3, to an error of its own."""
    home = tmp_path / "shared"
    home.mkdir()
    cluster.on("n2", "mount", "-t", "tmpfs", "none", str(home))
    try:
        job = cluster.submit(*TWO_BY_TWO, SCRIPT, QUICKSTART, f"run.dir={home}/run", "model.path=/nowhere")
        state = cluster.wait(job, 180)
    finally:
        cluster.on("n2", "umount", str(home))
    said = cluster.output(job)
    assert state == "FAILED", said
    assert said.count(f"node n2: cannot write {home}/run/logs/") == 2
    assert "excluded, 2 failures or more: n2" in said
    assert cluster.show(job)["NodeList"] == "n[1,3]"
    assert re.search(r"rank \d on n[13] ended with code 2: error: model.path", said)
    assert "not requeued: fix that and submit again" in said


def test_a_stop_saves_and_goes_on_as_if_nothing_had_happened(
    cluster: Cluster, bank: Path, by_torchrun: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The signal that Slurm sends before the time limit; the only checkpoint so far is the one it makes."""
    job = cluster.submit(*TWO_BY_TWO, SCRIPT, *settings(bank, tmp_path))
    until(lambda: (tmp_path / "metrics.jsonl").exists(), cluster, job)
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    said = cluster.output(job)
    assert f"slice 0 of job {job}: stopped on request; requeued" in said
    assert re.search(r"resuming after step [1-4] ", said), said  # a fast machine is past step 1 when the signal arrives
    assert (tmp_path / "logs" / f"{job}_0" / "rank_0.exit").read_text().startswith("75 n1 ")
    assert untimed(tmp_path / "metrics.jsonl") == by_torchrun


def preempt(cluster: Cluster, job: str) -> None:
    """A job of a higher priority takes all nodes for a moment."""
    script = cluster.home / "urgent.sh"
    script.write_text("#!/bin/sh\nsleep 3\n")
    cluster.submit("--partition=urgent", f"--nodes={len(cluster.nodes)}", "--exclusive", str(script))


INTERRUPTIONS = {
    "requeue": lambda cluster, job: cluster.ask("scontrol", "requeue", job),
    "preemption": preempt,
    "node_down": lambda cluster, job: cluster.ask("scontrol", "update", "nodename=n2", "state=down", "reason=test"),
    "power_cut": lambda cluster, job: cluster.power_cut("n2"),
    "batch_host_killed": lambda cluster, job: cluster.power_cut("n1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_slurm_interrupts_a_job_and_it_goes_on(
    cluster: Cluster, bank: Path, by_torchrun: list[dict[str, Any]], tmp_path: Path, interruption: str
) -> None:
    job = cluster.submit(*TWO_BY_TWO, SCRIPT, *settings(bank, tmp_path, "train.save_every=1"))
    until(lambda: (tmp_path / "checkpoints" / "step_000001" / "manifest.json").exists(), cluster, job)
    INTERRUPTIONS[interruption](cluster, job)
    try:
        until_resumed(cluster, job, interruption)
        assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    finally:
        cluster.mend("n1", "n2")
    assert cluster.show(job)["Restarts"] == "1"
    assert untimed(tmp_path / "metrics.jsonl") == by_torchrun
    assert json.loads((tmp_path / "logs" / f"{job}.json").read_text())["faults"] == 0, "not the job's fault"


@pytest.mark.slow
def test_a_time_limit_ends_slices_and_the_job_goes_on(cluster: Cluster, bank: Path, tmp_path: Path) -> None:
    """Slurm may send its signal up to a minute early: between 60 and 120 of 180 seconds."""
    limit = ("--time=3", "--signal=B:USR1@60")
    job = cluster.submit(*TWO_BY_TWO, *limit, SCRIPT, *settings(bank, tmp_path, "train.steps=250"))
    stopped = f"slice 0 of job {job}: stopped on request; requeued"
    until(lambda: stopped in cluster.output(job), cluster, job)
    until_resumed(cluster, job, "time limit")
    assert cluster.wait(job, 600) == "COMPLETED", cluster.output(job)
    assert [line["step"] for line in untimed(tmp_path / "metrics.jsonl")] == list(range(1, 251))


@pytest.mark.slow
def test_slices_that_are_too_short_end_the_job(cluster: Cluster, bank: Path, tmp_path: Path) -> None:
    """The signal comes while the tasks still prepare themselves."""
    limit = ("--time=2", "--signal=B:USR1@115")  # within half a minute
    job = cluster.submit(*TWO_BY_TWO, *limit, SCRIPT, *settings(bank, tmp_path, "cluster.setup='sleep 70'"))
    assert cluster.wait(job, 400) == "FAILED", cluster.output(job)
    assert "not requeued: 2 slices in a row made no checkpoint; the time limit is too short" in cluster.output(job)
    assert cluster.show(job)["ExitCode"] == "75:0"


@pytest.mark.slow
def test_a_cancelled_job_stays_cancelled(cluster: Cluster, bank: Path, tmp_path: Path) -> None:
    job = cluster.submit(*TWO_BY_TWO, SCRIPT, *settings(bank, tmp_path))
    until(lambda: (tmp_path / "metrics.jsonl").exists(), cluster, job)
    cluster.ask("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    until(lambda: "Slurm is ending it" in cluster.output(job), cluster, job, 60)


def until(happened: Any, cluster: Cluster, job: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, cluster.output(job)[-4000:]
        time.sleep(0.05)


def until_resumed(cluster: Cluster, job: str, fault: str) -> None:
    """Waits for a job that was just interrupted to go on, and says how long that took (`pytest -rP` shows it)."""
    begun = time.monotonic()
    until(lambda: "resuming after step" in cluster.output(job), cluster, job)
    print(f"{fault}: resumed after {time.monotonic() - begun:.0f} s")


def rank_process(job: str, rank: int) -> int:
    """The host's id of a rank's Python."""
    wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}"}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_text().split("\0")
            environ = set((place / "environ").read_text(errors="replace").split("\0"))
        except OSError:
            continue
        if words[1:3] == ["-m", "slurm.rank"] and wanted <= environ:
            return int(place.name)
    raise AssertionError(f"rank {rank} of job {job} is not running")
