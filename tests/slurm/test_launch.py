"""Launching a chain: its batch scripts, and what is refused or warned of before anything is submitted."""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from launch import QUICKSTART
from launched import ROOT, launch, launch_here
from processes import program

from nemo_r3 import capacity
from nemo_r3.config import Config, load
from nemo_r3.units import GIB
from slurm import chain
from slurm.launch import SHARED, job_arrays, parser

GOLDEN = Path(__file__).with_name("golden")
EXAMPLE = "slurm/clusters/example.yaml"
LLAMA = "configs/countdown-llama-3.1-8b-1n8g-tp2dp4.yaml"
SIZES = {
    "1_node": [QUICKSTART, "run.dir=runs/one", "cluster.time_minutes=60"],
    "8_nodes": [
        *(QUICKSTART, "run.dir=runs/eight", "--cluster", EXAMPLE, "cluster.nodes=8"),  # settings may come later
        *("--mine", "cluster.nodes=4", "--export", "cluster.nodes=1"),
    ],
    "64_nodes": [
        *(QUICKSTART, "run.dir=runs/many", "cluster.nodes=64", "actor.tensor_parallel=2", "--cluster", EXAMPLE),
        *("--sweep", "actor.lr=1e-6,5e-7", "seed=1,2", "--from", "train"),
    ],
}


@pytest.mark.parametrize("size", SIZES)
def test_dry_run_prints_every_batch_script(size: str) -> None:
    done = launch(*SIZES[size], "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    found = done.stdout.replace(sys.executable, "PYTHON").replace(str(ROOT), "ROOT")
    golden = GOLDEN / f"{size}.sbatch"
    assert found == golden.read_text(), f"if that is right: write it to {golden}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["cluster.time_minutes=0"], "stage mine: cluster.time_minutes: the jobs of a chain need a time limit"),
        (["--train", "cluster.time_minutes=0"], "stage train: cluster.time_minutes: "),
        (["--train", "actor.lrr=1"], "stage train: actor.lrr: unknown key; did you mean actor.lr?"),
        (["--sweep", "actor.lr=1e-6,fast"], "stage train: actor.lr"),
        (["--sweep", "run.dir=a,b"], "--sweep run.dir=a,b: expected key=value,value"),
        (["--sweep", "seed=1,1"], "--sweep seed=1,1: a value comes twice"),
        (["--sweep", "seed"], "--sweep seed: expected key=value,value"),
        (["--sweep", "cluster.nodes=1,2"], "--sweep cluster.nodes=1,2: the jobs of an array have one size"),
        (["--sweep", "model.path=/m/a/b,/m/a_b"], "--sweep model.path=/m/a/b,/m/a_b: two values would share one run"),
        (["--sweep", f"dialogue.reflect=Why,{'why ' * 60}"], "--sweep: a point's settings become the name of its run"),
        (["--evaluate", "cluster.gpus_per_node=3", "actor.tensor_parallel=2"], "stage evaluate: "),
        (["--train", "cluster.nodes=3", "actor.tensor_parallel=2"], "stage train: "),
        (["cluster.options=[-p gpu]"], "cluster.options: a chain takes --name and --name=value, got -p gpu"),
        (["cluster.partition='gpu\n\ntouch x #'"], "stage mine: --partition='gpu\\ntouch x #' has a line break"),
        (["cluster.options=['--qos=long\n\nx']"], "stage mine: --qos='long\\nx' has a line break"),
        (["--cluster", "nowhere.yaml"], "--cluster nowhere.yaml: No such file or directory\n"),
        (["--cluster", "configs/quickstart.yaml"], "configs/quickstart.yaml: "),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_submitted(
    tmp_path: Path, arguments: list[str], expected: str
) -> None:
    slurm = slurm_that_refuses(tmp_path, after=9)
    given = (QUICKSTART, f"run.dir={tmp_path}/run", "cluster.time_minutes=60", *arguments)
    for done in (launch(*given, "--dry-run"), launch(*given, environment=slurm)):
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {expected}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists() and not (tmp_path / "asked").exists()


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "8b").mkdir()
    shutil.copy(ROOT / "tests/shapes/llama-3.1-8b.json", tmp_path / "8b" / "config.json")
    return f"model.path={tmp_path}/8b"


def test_a_training_that_cannot_fit_is_refused_before_anything_is_submitted(tmp_path: Path, model: str) -> None:
    given = (LLAMA, f"run.dir={tmp_path}/run", model)
    settings = (*given, "--cluster", EXAMPLE, "--train", "actor.offload_optimizer=false")
    slurm = slurm_that_refuses(tmp_path, after=9)
    done = launch(*settings, environment=slurm)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: stage train: the actor's 41 GiB and vLLM's 40 ")
    assert done.stderr.endswith("(cluster.gpu_memory_gb); this fits: actor.offload_optimizer=true\n")
    assert not (tmp_path / "asked").exists()
    fits = launch(*settings, "cluster.gpu_memory_gb=139", "--dry-run")
    assert fits.returncode == 0 and fits.stdout.startswith("# train fits: 96 GiB of each GPU are left for activations")


def test_a_disk_that_is_too_small_is_refused_where_the_run_directory_is(tmp_path: Path, model: str) -> None:
    settings = (LLAMA, f"run.dir={tmp_path}/run", model, "train.keep_checkpoints=1000000", "--cluster", EXAMPLE)
    done = launch(*settings, environment=slurm_that_refuses(tmp_path, after=9))
    assert done.returncode == 2 and done.stderr.startswith(f"error: stage train: run.dir: {tmp_path} has ")
    assert launch(*settings, "--dry-run").returncode == 0, "a laptop has another disk"


def test_a_checkpoint_to_start_from_is_looked_for_where_the_run_directory_is(tmp_path: Path) -> None:
    settings = (QUICKSTART, f"run.dir={tmp_path}/run", "cluster.time_minutes=60", f"train.start_from={tmp_path}/gone")
    done = launch(*settings, environment=slurm_that_refuses(tmp_path, after=9))
    assert done.returncode == 2 and done.stderr.startswith(f"error: train.start_from: {tmp_path}/gone is no complete ")
    assert launch(*settings, "--dry-run").returncode == 0


def test_the_runs_of_a_sweep_share_the_disk(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda path: SimpleNamespace(free=900 * GIB))
    settings = (LLAMA, f"run.dir={tmp_path}/run", model, "--cluster", EXAMPLE)
    slurm = slurm_that_refuses(tmp_path, after=9)
    done = launch(*settings, "--sweep", "seed=1,2,3", environment=slurm)
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "asked").exists()
    assert done.stderr == (
        f"error: stage train: run.dir: {tmp_path} has 900.0 GiB free for checkpoints, and 9 x 104.7 GiB are still to "
        "come (train.keep_checkpoints=2, and the one being written, of each of 3 runs)\n"
    )
    assert launch(*settings, "--sweep", "seed=1,2", environment=slurm).returncode == 0


def test_a_model_that_is_elsewhere_is_said_not_to_be_checked(tmp_path: Path) -> None:
    settings = (LLAMA, f"run.dir={tmp_path}/run", "model.path=/models/8b", "--cluster", EXAMPLE, "--dry-run")
    first = launch(*settings).stdout.splitlines()[0]
    assert first.startswith("# not checked whether training fits: model.path: /models/8b is not a directory")


def test_a_sweep_mines_once_unless_it_changes_what_is_mined(tmp_path: Path) -> None:
    base = [QUICKSTART, f"run.dir={tmp_path}", "cluster.time_minutes=60", "--dry-run", "--sweep"]
    once = launch(*base, "actor.lr=1e-5,1e-6").stdout.splitlines()
    assert sum("RECIPE=mine" in line for line in once) == 1
    assert sum(f"failures.path={tmp_path}/failures" in line for line in once if "RECIPE=train" in line) == 2
    assert "#SBATCH --dependency=afterok:MINE_JOB" in once and "#SBATCH --dependency=aftercorr:TRAIN_JOB" in once
    each = launch(*base, "actor.lr=1e-5", "rollout.temperature=0.8,1.0").stdout.splitlines()
    assert sum("RECIPE=mine" in line for line in each) == 2
    assert "#SBATCH --dependency=aftercorr:MINE_JOB" in each


def test_what_a_sweep_may_share_are_settings() -> None:
    assert {field.name for field in dataclasses.fields(Config)} >= SHARED


def test_a_clusters_file_is_taken_to_the_letter(tmp_path: Path) -> None:
    """Longer than the lines that YAML is written in, with every kind of quote, and of several lines."""
    facts = {
        "setup": "source /a/very/long/path/to/some/venv/bin/activate\nexport NCCL_SOCKET_IFNAME=ib0 A='x: #y' B=\"é\"",
        "container_mounts": [f"/a/long/path/number/{number}:/mnt/{number}" for number in range(6)],
        "min_disk_gb": 0.5,
        "memory_gb": 100,
    }
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(facts))
    wanted = [QUICKSTART, f"run.dir={tmp_path}/run", "cluster.time_minutes=60", "--cluster", f"{tmp_path}/here.yaml"]
    (array, *_) = job_arrays(parser().parse_args(wanted))
    found = load(array.stages[0].argv).cluster
    assert {name: getattr(found, name) for name in facts} == facts


def test_without_a_bank_nothing_is_mined(tmp_path: Path) -> None:
    settings = (f"run.dir={tmp_path}", "cluster.time_minutes=60", "failures.source=online")
    assert "RECIPE=mine" not in launch(QUICKSTART, *settings, "--dry-run").stdout


def test_without_slurm_it_says_so(tmp_path: Path) -> None:
    program(tmp_path, "srun", "")  # some sites have it where nothing can be submitted
    srun_alone = os.environ | {"PATH": str(tmp_path)}
    done = launch(QUICKSTART, f"run.dir={tmp_path}/run", "cluster.time_minutes=60", environment=srun_alone)
    assert done.returncode == 2 and done.stderr.startswith("error: sbatch was not found: there is no Slurm here (")


def slurm_that_refuses(path: Path, after: int) -> dict[str, str]:
    """The environment of a Slurm that takes so many submissions and no more; what it cancels is in `cancelled`."""
    commands = {
        "sbatch": f"""[ "$1" != --version ] || exit 0
            for script; do :; done; grep -h dependency "$script" >> {path}/dependencies
            echo >> {path}/asked; n=$(wc -l < {path}/asked)
            [ $n -le {after} ] && exec echo Submitted batch job $n
            echo 'sbatch: error: no controller' >&2; exit 1""",
        "scancel": f'echo "$@" > {path}/cancelled',
    }
    for name, command in commands.items():
        program(path, name, command)
    return os.environ | {"PATH": f"{path}:{os.environ['PATH']}"}


def test_what_slurm_says_is_said_once(tmp_path: Path) -> None:
    slurm = slurm_that_refuses(tmp_path, after=0)
    done = launch(QUICKSTART, f"run.dir={tmp_path}/run", "cluster.time_minutes=60", environment=slurm)
    assert (done.returncode, done.stderr) == (2, "error: Slurm refused mine: sbatch: error: no controller\n")


def test_a_chain_that_slurm_refuses_half_way_is_taken_back_and_the_refused_stage_named(tmp_path: Path) -> None:
    slurm = slurm_that_refuses(tmp_path, after=2)
    settings = (f"run.dir={tmp_path}/run", "cluster.time_minutes=60", "--sweep", "seed=1,2,3")
    done = launch(QUICKSTART, *settings, environment=slurm)
    assert (done.returncode, done.stderr) == (2, "error: Slurm refused evaluate: sbatch: error: no controller\n")
    assert (tmp_path / "cancelled").read_text() == "1 2_0 2_1 2_2\n"
    waits = [line.rpartition("=")[2] for line in (tmp_path / "dependencies").read_text().splitlines()]
    assert waits == ["afterok:1", "aftercorr:2"]
    assert "has no chain" in launch("status", f"{tmp_path}/run").stderr


def test_a_half_chain_that_cannot_be_taken_back_is_left_to_the_user_by_name(tmp_path: Path) -> None:
    slurm = slurm_that_refuses(tmp_path, after=1)
    program(tmp_path, "scancel", "echo 'scancel: error: busy' >&2; exit 1")
    done = launch(QUICKSTART, f"run.dir={tmp_path}/run", "cluster.time_minutes=60", environment=slurm)
    assert done.returncode == 2
    assert done.stderr == (
        "error: Slurm refused train: sbatch: error: no controller; cancel 1 yourself: "
        "`scancel 1` failed: scancel: error: busy\n"
    )


def test_a_run_directory_that_cannot_be_written_is_named_and_nothing_stays_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = slurm_that_refuses(tmp_path, after=9)
    (tmp_path / "file").touch()
    done = launch(QUICKSTART, f"run.dir={tmp_path}/file", "cluster.time_minutes=60", environment=slurm)
    assert done.stderr == f"error: run.dir: cannot write {tmp_path}/file/chain/jobs (Not a directory)\n"
    assert done.returncode == 2

    def record(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "chain.json")

    monkeypatch.setattr(chain, "record", record)
    done = launch(QUICKSTART, f"run.dir={tmp_path}/run", "cluster.time_minutes=60", environment=slurm)
    assert (done.returncode, done.stderr) == (2, "error: run.dir: cannot write chain.json (Disk quota exceeded)\n")
    assert (tmp_path / "cancelled").read_text() == "1 2 3 4\n"


def test_elsewhere_than_in_the_repository_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launched.ROOT", tmp_path)
    done = launch(str(ROOT / QUICKSTART), f"run.dir={tmp_path}/run", "cluster.time_minutes=60", "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path} is not the repository's root, where the jobs start: go there\n"


def test_gpus_without_cores_and_memory_are_warned_of(tmp_path: Path) -> None:
    settings = (f"run.dir={tmp_path}/run", "cluster.time_minutes=60", "cluster.gpus_per_node=8", "--dry-run")
    done = launch(QUICKSTART, *settings)
    assert done.returncode == 0 and done.stderr.startswith("warning: cluster.cpus_per_task=0, cluster.memory_gb=0: ")
    assert done.stderr.count("\n") == 1


def test_here_a_stage_that_fails_ends_the_chain(tmp_path: Path) -> None:
    done = launch_here(QUICKSTART, f"run.dir={tmp_path}", "--mine", f"model.path={tmp_path}/nowhere")
    assert done.returncode == 2 and "model.path" in done.stderr
    said = launch("status", str(tmp_path)).stdout.splitlines()
    assert [line.split(maxsplit=1) for line in said] == [
        ["mine", "failed with code 2: see its output"],
        ["train", "cancelled: mine did not succeed"],
        ["evaluate", "cancelled: mine did not succeed"],
        ["export", "cancelled: mine did not succeed"],
    ]


def test_the_example_has_settings_of_cluster_alone() -> None:
    text = launch(QUICKSTART, "cluster.time_minutes=90", "--cluster", EXAMPLE, "--dry-run").stdout
    assert "#SBATCH --partition=gpu" in text
    assert "export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0" in text, "NCCL's and gloo's network interfaces"
    assert "#SBATCH --time=90" in text, "the command line wins"
    assert shlex.split(text.splitlines()[1])[-1] == "RECIPE=mine"
