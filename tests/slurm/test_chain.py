"""What became of a chain: its status, and how it ends on a laptop and on the virtual cluster."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from cluster import Cluster
from launch import QUICKSTART, ROOT, SMALL
from launched import launch, launch_here
from refusals import refusal

from slurm import chain
from slurm.stage import Stage


def test_status_of_no_chain(tmp_path: Path) -> None:
    for verb in ("status", "cancel"):
        done = launch(verb, str(tmp_path))
        assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path} has no chain")


def test_a_point_that_fails_cancels_its_own_stages_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = chain.folder_of(tmp_path)
    folder.mkdir()
    (folder / "evaluate_seed=1.code").write_text("0\n")  # of the chain before
    points = [Stage(recipe, f"seed={seed}", (), folder) for recipe in ("train", "evaluate") for seed in (1, 2)]
    chain.record(folder, [(stage, f"7_{n}") for n, stage in enumerate([Stage("mine", "", (), folder), *points])])
    for stage, code in (("mine", 0), ("train_seed=1", 1), ("train_seed=2", 0)):
        (folder / f"{stage}.code").write_text(f"{code}\n")
    monkeypatch.setattr(chain, "ask", lambda *_: "7_4|RUNNING|n1\n")
    said = [line.split(maxsplit=1)[1].strip() for line in chain.status(tmp_path).replace(" seed", "-seed").splitlines()]
    assert [line.partition("  ")[2] for line in said] == [
        "done",
        f"failed with code 1: see its output ({folder}/jobs/7_1_0_log.out)",
        "done",
        "cancelled: train did not succeed",
        "running n1",
    ]


def test_a_chain_whose_jobs_are_in_the_queue_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = chain.folder_of(tmp_path)
    chain.refuse_another(folder)
    chain.record(folder, [(Stage(recipe, "", (), folder), job) for recipe, job in (("train", "7"), ("evaluate", "8"))])
    monkeypatch.setattr(chain, "ask", lambda *_: "7|RUNNING|n1\n9|PENDING|(Priority)\n")
    assert f"{folder} has a chain under way (jobs 7): wait for it" in refusal(lambda: chain.refuse_another(folder))
    of_evaluate = chain.status(tmp_path).splitlines()[1]
    assert of_evaluate.endswith("ended by Slurm: cancelled before it began"), "training may yet succeed"
    monkeypatch.setattr(chain, "ask", lambda *_: "9|PENDING|(Priority)\n")
    chain.refuse_another(folder)


def test_what_a_job_says_before_its_first_slice_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = chain.folder_of(tmp_path)
    chain.record(folder, [(Stage("mine", "", (), folder), "7")])
    (folder / "mine.code").write_text("2\n")
    (folder / "jobs").mkdir()
    (folder / "jobs" / "7_0_log.out").write_text("submitit INFO\nerror: my.yaml: train.stepz: unknown key\n")
    monkeypatch.setattr(chain, "ask", lambda *_: "")
    assert "failed with code 2: error: my.yaml: train.stepz: unknown key (" in chain.status(tmp_path)
    (folder / "mine.code").write_text("75\n")
    assert "stopped with code 75: " in chain.status(tmp_path)


def test_a_stage_that_is_requeued_has_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, seen = Stage("train", "", (), tmp_path), []
    (tmp_path / "train.code").write_text("137\n")
    process = SimpleNamespace(wait=lambda: seen.append(stage.ended()) or 0)
    monkeypatch.setattr("slurm.stage.subprocess.Popen", lambda *_, **__: process)
    monkeypatch.setattr("slurm.stage.signal.signal", lambda *_: None)
    stage()
    assert (seen, stage.ended()) == ([None], 0)


def test_a_batch_script_has_the_launching_python_and_ends_as_it_began_though_it_is_edited_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "train.sh").write_text(
        f'[ "$BATCH_PYTHON" = {sys.executable} ] || exit 8\necho exit 9 >>"$0"\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slurm.stage.signal.signal", lambda *_: None)
    stage = Stage("train", "", (), tmp_path)
    stage()
    assert stage.ended() == 0


def test_a_job_that_starts_elsewhere_goes_to_the_repository(tmp_path: Path) -> None:
    """The launching Python has nemo_r3 installed, and not slurm, which is imported before a stage can say anything."""
    environment = os.environ | {"SLURM_SUBMIT_DIR": str(ROOT)}
    environment.pop("PYTHONPATH", None)
    script = f"{chain.TO_REPOSITORY}\n{chain.PYTHON} -c 'import slurm.stage'"
    assert subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment).returncode == 0


@pytest.mark.slow
def test_here_the_chain_runs_to_its_end(tmp_path: Path) -> None:
    done = launch_here(QUICKSTART, *SMALL, f"run.dir={tmp_path}", "--evaluate", "evaluate.problems=8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "export" / "model.safetensors").exists()
    assert [line.split()[1] for line in launch("status", str(tmp_path)).stdout.splitlines()] == ["done"] * 4


def chain_of(path: Path) -> dict[str, str]:
    """Stage -> job."""
    rows = json.loads((path / "chain" / "chain.json").read_text())
    return {f"{row['recipe']} {row['point']}".strip(): row["job"] for row in rows}


def wait(cluster: Cluster, path: Path, seconds: float) -> dict[str, str]:
    """Stage -> what `status` says, once no job of the chain is in the queue."""
    deadline = time.monotonic() + seconds
    while {"PENDING", "RUNNING", "COMPLETING"} & {
        cluster.show(job).get("JobState", "") for job in chain_of(path).values()
    }:
        assert time.monotonic() < deadline, cluster.ask("squeue", "--array")
        time.sleep(1)
    said = launch("status", str(path), environment=cluster.environment)
    assert said.returncode == 0, said.stderr
    names = sorted(chain_of(path), key=len, reverse=True)
    found = {}
    for line in said.stdout.splitlines():
        name = next(name for name in names if line.startswith(f"{name} "))
        found[name] = line[len(name) :].split(maxsplit=1)[1]
    return found


@pytest.mark.slurm
@pytest.mark.slow
def test_the_chain_runs_to_its_end_each_stage_at_its_own_size_and_one_requeued(
    cluster: Cluster, tmp_path: Path
) -> None:
    settings = [QUICKSTART, *SMALL, f"run.dir={tmp_path}/run", "cluster.time_minutes=20", "cluster.min_disk_gb=0.1"]
    own = ["--train", "cluster.nodes=2", "actor.tensor_parallel=2", "--evaluate", "evaluate.problems=8"]
    dry = launch(*settings, *own, "--dry-run").stdout
    done = launch(*settings, *own, environment=cluster.environment)
    assert done.returncode == 0, done.stderr
    again = launch(*settings, environment=cluster.environment)
    assert again.returncode == 2 and "has a chain under way" in again.stderr
    train = chain_of(tmp_path / "run")["train"]
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, cluster.ask("squeue")
        time.sleep(0.2)
    cluster.ask("scontrol", "requeue", train)  # as after a preemption; the stages after it keep waiting
    assert wait(cluster, tmp_path / "run", 400) == dict.fromkeys(["mine", "train", "evaluate", "export"], "done")
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    jobs = chain_of(tmp_path / "run")
    assert cluster.show(train)["Restarts"] == "1"
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)), "every step once"
    assert cluster.show(jobs["train"])["NumNodes"] == "2" and cluster.show(jobs["export"])["NumNodes"] == "1"
    for script in (tmp_path / "run" / "chain" / "jobs").glob("*_submission.sh"):
        text = script.read_text()
        for name, job in jobs.items():
            text = text.replace(f"afterok:{job}", f"afterok:{name.upper()}_JOB")
        assert text in dry, "what was submitted is what --dry-run shows"


@pytest.mark.slurm
@pytest.mark.slow
def test_a_sweep_of_four(cluster: Cluster, bank: Path, tmp_path: Path) -> None:
    shutil.copytree(bank, tmp_path / "failures")
    settings = [QUICKSTART, *SMALL, f"run.dir={tmp_path}", "cluster.time_minutes=20", "cluster.min_disk_gb=0.1"]
    done = launch(
        *(*settings, "train.steps=1", "--sweep", "actor.lr=1e-4,1e-5", "seed=1,2", "--evaluate", "evaluate.problems=4"),
        environment=cluster.environment,
    )
    assert done.returncode == 0, done.stderr
    found = wait(cluster, tmp_path, 600)
    points = [f"actor.lr={lr},seed={seed}" for lr in ("1e-4", "1e-5") for seed in (1, 2)]
    stages = [f"{recipe} {point}" for recipe in ("train", "evaluate", "export") for point in points]
    assert found == dict.fromkeys(["mine", *stages], "done")
    for point in points:
        assert (tmp_path / point / "export" / "model.safetensors").exists()
    configs = [(tmp_path / point / "config.yaml").read_text() for point in points]
    assert len(set(configs)) == 4


@pytest.mark.slurm
@pytest.mark.slow
def test_a_stage_that_fails_cancels_those_behind_it(cluster: Cluster, tmp_path: Path) -> None:
    settings = [QUICKSTART, *SMALL, f"run.dir={tmp_path}/run", "cluster.time_minutes=20", "cluster.min_disk_gb=0.1"]
    done = launch(*settings, "--mine", f"model.path={tmp_path}/nowhere", environment=cluster.environment)
    assert done.returncode == 0, done.stderr
    found = wait(cluster, tmp_path / "run", 120)
    assert found["mine"].startswith("failed with code 2: slice 0 of job ") and "model.path" in found["mine"]
    for stage in ("train", "evaluate", "export"):
        assert found[stage] == "cancelled: mine did not succeed"
        assert cluster.show(chain_of(tmp_path / "run")[stage])["JobState"] == "CANCELLED"


@pytest.mark.slurm
@pytest.mark.slow
def test_a_chain_is_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    held = [QUICKSTART, f"run.dir={tmp_path}", "cluster.time_minutes=20", "cluster.options=[--hold]"]
    assert launch(*held, environment=cluster.environment).returncode == 0
    waiting = launch("status", str(tmp_path), environment=cluster.environment).stdout.splitlines()
    assert len(waiting) == 4 and all("pending (" in line for line in waiting)
    said = launch("cancel", str(tmp_path), environment=cluster.environment)
    assert said.stdout == f"cancelled: {', '.join(chain_of(tmp_path).values())}\n"
    assert wait(cluster, tmp_path, 30)["mine"] == "ended by Slurm: cancelled before it began"
    refused = launch(*held, "cluster.nodes=9", environment=cluster.environment)
    assert refused.returncode == 2 and "error: Slurm refused mine: sbatch: error: " in refused.stderr
