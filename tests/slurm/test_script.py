"""What `train.sh` asks of Slurm, whose commands only note it here, and how `rank.sh` ends; no Slurm is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import ROOT, search_path
from processes import program

COMMANDS = {
    "srun": 'case "$*" in *slurm.health*) echo n1: fine ;; esac',
    "timeout": 'shift; exec "$@"',
    "squeue": "echo RUNNING",
    "scontrol": 'if [ "$1" = show ]; then echo n1; fi',
}


def run_slice(
    folder: Path, *overrides: str, config: str = "configs/quickstart.yaml", **commands: str
) -> tuple[list[str], str]:
    """The commands that a slice of job 7 gives, and what it prints."""
    for name, script in (COMMANDS | commands).items():
        note = f"words=\"{name} $*\"; echo ${{words//$'\\n'/ }} >>'{folder}/asked'"
        program(folder, name, f"{note}\n{script}")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
    job |= {"PATH": f"{folder}:{search_path()}"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", "slurm/train.sh", config, f"run.dir={folder}/run", *overrides],
        cwd=ROOT,
        env=kept | job,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return (folder / "asked").read_text().splitlines(), done.stdout


def test_a_container_is_imported_once_and_removed(tmp_path: Path) -> None:
    asked, said = run_slice(tmp_path, "cluster.container=/i.sqsh", "cluster.health_minutes=20")
    assert "slice 0 of job 7: finished; done" in said
    limit, removal = (command for command in asked if command.startswith("timeout"))
    check, ranks, removed = (command for command in asked if command.startswith("srun"))
    assert limit == f"timeout 20m {check}" and "slurm.health" in check and "slurm/rank.sh" in ranks
    for command in (check, ranks):
        assert "--container-image=/i.sqsh --container-name=nemo_r3_7 " in command
    assert removed == "srun --ntasks=1 --ntasks-per-node=1 enroot remove --force pyxis_nemo_r3_7"
    assert removal == f"timeout 60 {removed}"


def test_a_check_that_takes_too_long_is_said_to(tmp_path: Path) -> None:
    asked, said = run_slice(tmp_path, timeout="exit 124")
    assert "slice 0 of job 7: the health check took longer than cluster.health_minutes=5 (" in said
    assert "requeued: fault 1 of 3 allowed" in said and "scontrol requeue 7" in asked
    assert not any("rank.sh" in command for command in asked)


@pytest.mark.parametrize(
    ("left", "code", "said"),
    [
        ("echo 0 n1 1.0 >$LOGS/rank_0.exit", 0, "finished; done"),
        (":", 143, "stopped on request before the ranks began; requeued"),  # it ended cluster.setup
    ],
)
def test_a_signal_that_comes_as_ranks_end_or_before_they_begin_is_no_fault(
    tmp_path: Path, left: str, code: int, said: str
) -> None:
    ranks = f"trap '' USR1; kill -USR1 $PPID; sleep 0.2; {left}; exit {code}"
    _, told = run_slice(tmp_path, srun=f'case "$*" in *slurm.health*) echo n1: fine ;; *) {ranks} ;; esac')
    assert f"slice 0 of job 7: {said}" in told


def test_a_config_that_is_edited_meanwhile_does_not_change_how_a_slice_ends(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"extends: {ROOT}/configs/quickstart.yaml\n")
    edit = f'case "$*" in *slurm.health*) echo n1: fine ;; *) echo "run: [" >{mine}; exit 75 ;; esac'
    asked, said = run_slice(tmp_path, config=str(mine), srun=edit)
    assert "slice 0 of job 7: stopped on request before the ranks began; requeued" in said
    assert "scontrol requeue 7" in asked


LOOKS = (
    "import runpy\nfrom nemo_r3 import signals\n"
    "runpy.run_module = lambda recipe, **_: print(recipe, signals.noted())\n"
    "runpy.run_path('slurm/rank.py', run_name='__main__')"
)


@pytest.mark.parametrize("noted", ["SIGUSR1", "None"])
def test_a_rank_looks_for_a_signal_that_came_before_it_listened(tmp_path: Path, noted: str) -> None:
    if noted == "SIGUSR1":
        (tmp_path / "stop").touch()
    job = os.environ | {"LOGS": str(tmp_path), "RECIPE": "train"}
    done = subprocess.run([sys.executable, "-c", LOOKS], cwd=ROOT, env=job, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"recipes.train {noted}\n", done.stderr


def test_a_rank_whose_script_is_edited_meanwhile_leaves_its_exit_code(tmp_path: Path) -> None:
    script = shutil.copy(ROOT / "slurm" / "rank.sh", tmp_path)
    program(tmp_path, "python3", f": >{script}; exit 3")
    job = {"PATH": f"{tmp_path}:{search_path()}", "LOGS": str(tmp_path), "LAUNCHER": "srun"}
    job |= {"SLURM_PROCID": "0", "SLURMD_NODENAME": "n1"}
    assert subprocess.run(["bash", script], env=job, timeout=60).returncode == 3
    assert (tmp_path / "rank_0.exit").read_text().startswith("3 n1 ")
