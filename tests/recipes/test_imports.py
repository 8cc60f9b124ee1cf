"""Nothing that reads the environment is imported before `join` prepares it, and nothing slow before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import bare
import pytest
from launch import QUICKSTART, ROOT

import recipes

READ_THE_ENVIRONMENT = {"megatron", "transformer_engine", "vllm"}
SLOW = READ_THE_ENVIRONMENT | {"transformers", "matplotlib"}


def test_an_import_brings_no_backend() -> None:
    code = "import os, sys, recipes.train, recipes.mine, recipes.evaluate, recipes.export; print(*sys.modules)"
    code += "; print(*(os.environ[name] for name in sys.argv[1:]))"
    set_early = ("OMP_WAIT_POLICY", "CUDA_DEVICE_MAX_CONNECTIONS")
    environment = {name: value for name, value in os.environ.items() if name not in set_early}
    command = [sys.executable, "-c", code, *set_early]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    assert not SLOW & set(done.stdout.split())
    assert done.stdout.splitlines()[1] == "passive 1", "threads without work sleep; CUDA has not been asked for GPUs"


@pytest.mark.parametrize(("packages", "lacking"), [("", "omegaconf"), ("omegaconf", "torch")])
def test_an_interpreter_that_lacks_packages_is_told_what_to_do(packages: str, lacking: str, tmp_path: Path) -> None:
    command = bare.command(tmp_path, packages, "recipes.train")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {sys.executable} has no {lacking}: activate the environment first")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("packages", "module", "arguments", "says"),
    [
        ("omegaconf", "recipes.plan", [QUICKSTART], "fits, if"),
        ("omegaconf", "recipes.compare", ["{run}"], "1 of 1750"),
        ("omegaconf submitit", "slurm.launch", [QUICKSTART, "cluster.time_minutes=60", "--dry-run"], "#SBATCH"),
        ("omegaconf jinja2", "recipes.report", [QUICKSTART, "run.dir={run}"], "report.html"),
    ],
)
def test_what_runs_with_the_packages_that_docs_training_names(
    packages: str, module: str, arguments: list[str], says: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "rollouts").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.0}\n')
    (run / "config.yaml").write_text("model: {path: embedded}\n")
    (tmp_path / "packages").mkdir()
    given = (argument.format(run=run) for argument in arguments)
    command = bare.command(tmp_path / "packages", packages, module, *given)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert f"pip install {packages}`" in (ROOT / "docs" / "training.md").read_text()


def test_an_import_error_of_someone_else_s_making_keeps_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    recipes._explain(ModuleNotFoundError, ModuleNotFoundError("build the kernels first"), None)
    assert "build the kernels first" in capsys.readouterr().err


def test_a_bug_shows_its_traceback_where_there_is_no_torch(tmp_path: Path) -> None:
    (tmp_path / "buggy.py").write_text("import recipes\nfrom nemo_r3 import entry\nentry.main(lambda argv: 1 / 0)\n")
    done = subprocess.run(bare.command(tmp_path, "omegaconf", "buggy"), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")
