"""The sbatch line of a config, and whether an allocation fits one; no Slurm is needed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from processes import program
from refusals import refusal

from nemo_r3.config import Config, load
from slurm.job import Allocation, assignments, ranks_per_node, read_allocation, shell_variables

ROOT = Path(__file__).parents[2]
QUICKSTART = "configs/quickstart.yaml"

LINES = {  # with the settings that are warned of
    (): (
        "sbatch --job-name=quickstart --nodes=1 --ntasks-per-node=1 --signal=B:USR1@600 "
        "slurm/train.sh configs/quickstart.yaml",
        "",
    ),
    ("cluster.nodes=8", "cluster.gpus_per_node=8", "cluster.cpus_per_task=14", "cluster.time_minutes=1440"): (
        "sbatch --job-name=quickstart --nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=14 --time=1440 "
        "--signal=B:USR1@600 slurm/train.sh configs/quickstart.yaml "
        "cluster.nodes=8 cluster.gpus_per_node=8 cluster.cpus_per_task=14 cluster.time_minutes=1440",
        "cluster.memory_gb=0",
    ),
    (
        *("run.dir=/scratch/my run", "actor.tensor_parallel=8", "actor.pipeline_parallel=2", "cluster.nodes=64"),
        *("cluster.gpus_per_node=8", "cluster.account=llm", "cluster.partition=gpu", "cluster.cpus_per_task=14"),
        *("cluster.memory_gb=1800", "cluster.options=[--exclusive, --comment=it's mine]", "cluster.signal_seconds=900"),
    ): (
        "sbatch '--job-name=my run' --partition=gpu --account=llm --nodes=64 --ntasks-per-node=8 --gpus-per-node=8 "
        """--cpus-per-task=14 --mem=1800G --signal=B:USR1@900 --exclusive '--comment=it'"'"'s mine' slurm/train.sh """
        "configs/quickstart.yaml 'run.dir=/scratch/my run' actor.tensor_parallel=8 actor.pipeline_parallel=2 "
        "cluster.nodes=64 cluster.gpus_per_node=8 cluster.account=llm cluster.partition=gpu "
        "cluster.cpus_per_task=14 cluster.memory_gb=1800 "
        """'cluster.options=[--exclusive, --comment=it'"'"'s mine]' cluster.signal_seconds=900""",
        "",
    ),
}


def train_sh(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
    command = ["bash", str(ROOT / "slurm" / "train.sh"), *arguments]
    return subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("overrides", LINES, ids=["1 node", "8 nodes", "64 nodes"])
def test_print_writes_the_sbatch_line(overrides: tuple[str, ...]) -> None:
    line, warned = LINES[overrides]
    done = train_sh("--print", QUICKSTART, *overrides)
    assert (done.returncode, done.stdout) == (0, line + "\n")
    assert shlex.split(done.stdout)[-1 - len(overrides) :] == [QUICKSTART, *overrides]
    assert done.stderr.startswith(f"warning: {warned}: " if warned else "") and done.stderr.count("\n") == bool(warned)


def test_print_takes_the_quickstart_where_no_config_is_named() -> None:
    assert train_sh("--print").stdout == LINES[()][0] + "\n"


def test_a_bad_setting_or_place_is_one_line(tmp_path: Path) -> None:
    unknown = train_sh("--print", QUICKSTART, "cluster.node=2")
    assert unknown.returncode == 2 and "did you mean cluster.nodes?" in unknown.stderr
    outside = train_sh(QUICKSTART)
    assert outside.returncode == 2 and "there is no Slurm job around this" in outside.stderr
    elsewhere = train_sh("--print", cwd=tmp_path)
    assert elsewhere.returncode == 2 and "is not the repository's root" in elsewhere.stderr
    for done in (unknown, outside, elsewhere):
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout


def test_a_python_that_cannot_read_a_config_is_named(tmp_path: Path) -> None:
    bash = {"PATH": "/usr/bin:/bin", "BATCH_PYTHON": f"{tmp_path}/python3"}
    command = ["bash", "slurm/train.sh", "--print"]
    no_module = "No module named omegaconf"
    for script, why in ((f"echo '{no_module}' >&2; exit 1", f" ({no_module})"), ("exit 1", "")):
        program(tmp_path, "python3", script)
        done = subprocess.run(command, cwd=ROOT, env=bash, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"error: {tmp_path}/python3 needs to be Python 3.11 or later with omegaconf: ")
        assert done.stderr.endswith(f"; cluster.setup prepares the ranks alone{why}\n")


def test_the_scripts_own_options_are_the_defaults() -> None:
    """A plain `sbatch slurm/train.sh` gets the signal that `--print` would ask for."""
    script = (ROOT / "slurm" / "train.sh").read_text()
    assert f"#SBATCH --signal=B:USR1@{Config().cluster.signal_seconds}\n" in script


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_NTASKS": "8"}


def test_an_allocation_is_read_from_slurms_variables() -> None:
    gpus = {"SLURM_GPUS_ON_NODE": "4", "SLURM_RESTART_COUNT": "3"}
    assert read_allocation(JOB | gpus) == Allocation("7", restarts=3, nodes=2, tasks=4, gpus=4)
    assert read_allocation(JOB | gpus | {"SLURM_GPU_BIND": "none"}).gpus == 4
    assert read_allocation(JOB) == Allocation("7", restarts=0, nodes=2, tasks=4, gpus=None)
    unasked = {name: value for name, value in JOB.items() if name != "SLURM_NTASKS"}
    assert read_allocation(unasked).tasks == 1, "Slurm then counts cores"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"SLURM_TASKS_PER_NODE": "3,1"}, "uneven (3,1)"),
        ({"SLURM_GPUS_PER_TASK": "1"}, "--gpus-per-task hides a rank's GPU from its neighbours"),
        ({"SLURM_GPU_BIND": "closest"}, "--gpu-bind hides"),
        ({"SLURM_NTASKS_PER_GPU": "1"}, "--ntasks-per-gpu hides"),
    ],
)
def test_an_allocation_without_a_layout_is_refused(more: dict[str, str], expected: str) -> None:
    assert expected in refusal(lambda: read_allocation(JOB | more))


def config_with(*overrides: str) -> Config:
    return load([str(ROOT / QUICKSTART), *overrides])


@pytest.mark.parametrize(
    ("overrides", "tasks", "gpus", "ranks"),
    [
        ([], 4, None, 4),
        ([], 4, 4, 4),
        (["cluster.nodes=2", "cluster.gpus_per_node=4"], 4, None, 4),
        (["cluster.launcher=torchrun"], 1, 8, 8),
        (["cluster.launcher=torchrun"], 2, None, 2),
    ],
)
def test_an_allocation_that_fits(overrides: list[str], tasks: int, gpus: int | None, ranks: int) -> None:
    got = Allocation("7", 0, nodes=2, tasks=tasks, gpus=gpus)
    assert ranks_per_node(config_with(*overrides), got) == ranks


@pytest.mark.parametrize(
    ("overrides", "nodes", "tasks", "gpus", "both"),
    [
        (["cluster.nodes=4"], 2, 1, None, ["the job has 2 nodes", "cluster.nodes=4"]),
        (["cluster.gpus_per_node=8"], 1, 8, 4, ["the job has 4 GPUs per node", "cluster.gpus_per_node=8"]),
        (["cluster.gpus_per_node=8"], 1, 1, 8, ["1 tasks per node", "cluster.gpus_per_node=8", "--ntasks-per-node=8"]),
        ([], 1, 1, 8, ["the job has 1 tasks per node", "a task for each of a node's 8 GPUs"]),
        (["actor.tensor_parallel=4"], 2, 3, None, ["= 4 * 1 = 4", "6 ranks were launched"]),
    ],
)
def test_a_misfit_says_both(overrides: list[str], nodes: int, tasks: int, gpus: int | None, both: list[str]) -> None:
    message = refusal(lambda: ranks_per_node(config_with(*overrides), Allocation("7", 0, nodes, tasks, gpus)))
    assert all(part in message for part in both), message


def test_what_starts_the_ranks() -> None:
    got = Allocation("7", restarts=2, nodes=2, tasks=8, gpus=8)
    asked = ("run.dir=/r", "cluster.cpus_per_task=6", "cluster.container=/i.sqsh", "cluster.container_mounts=[/d:/d]")
    values = shell_variables(config_with(*asked), got)
    assert values["LOGS"] == "/r/logs/7_2"
    assert values["RANK_STEP"] == ["--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=6"]
    assert values["NODE_STEP"] == ["--ntasks=2", "--ntasks-per-node=1"]
    assert values["HEALTH_MINUTES"] == "5"
    here = os.getcwd()
    assert values["CONTAINER"] == [
        "--container-image=/i.sqsh",
        "--container-name=nemo_r3_7",
        f"--container-mounts={here}:{here},/d:/d",
        f"--container-workdir={here}",
    ]
    values = shell_variables(config_with(*asked, "cluster.launcher=torchrun"), got)
    assert values["RANK_STEP"] == ["--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=48"]


@pytest.mark.parametrize(("launcher", "tasks", "cpus"), [("torchrun", 1, 48), ("srun", 8, 6)])
def test_cores_that_the_job_asked_for_are_shared_by_the_ranks(
    monkeypatch: pytest.MonkeyPatch, launcher: str, tasks: int, cpus: int
) -> None:
    """Slurm counts them per task: one per node under torchrun, a rank each under srun."""
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", str(cpus))
    got = Allocation(job="7", restarts=0, nodes=2, tasks=tasks, gpus=8)
    values = shell_variables(config_with(f"cluster.launcher={launcher}"), got)
    assert (values["RANK_STEP"][-1], values["THREADS"]) == (f"--cpus-per-task={cpus}", "6")


def test_what_a_user_wrote_reaches_the_shell_unread() -> None:
    nasty = "$(touch /tmp/x) `id` \"'; echo\n&& *"
    values: dict[str, str | list[str]] = {"ONE": nasty, "MANY": [nasty, "", "a b"], "NONE": []}
    script = assignments(values) + r'printf "%s\0" "$ONE" "${MANY[@]}" "${#NONE[@]}"'
    done = subprocess.run(["bash", "-uc", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == [nasty, nasty, "", "a b", "0"]
