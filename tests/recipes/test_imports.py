"""Nothing that reads the environment is imported before `join` prepares it, and nothing slow before it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from launch import ROOT

AS_A_VERB = "sys.argv[0] = '-m'; runpy.run_module('recipes.train', run_name='__main__')"
READ_THE_ENVIRONMENT = {"megatron", "transformer_engine", "vllm"}
SLOW = READ_THE_ENVIRONMENT | {"transformers"}


def test_an_import_brings_no_backend() -> None:
    code = "import sys, recipes.train, recipes.mine, recipes.evaluate, recipes.export; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not SLOW & set(done.stdout.split())


def test_an_interpreter_without_torch_is_told_what_to_do(tmp_path: Path) -> None:
    """One whose packages are hidden, as outside of the environment."""
    command = [sys.executable, "-I", "-S", "-c", f"import runpy, sys; sys.path.append({str(ROOT)!r}); {AS_A_VERB}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {sys.executable} has no torch: activate the environment first")
    assert done.stderr.count("\n") == 1


def test_threads_without_work_sleep() -> None:
    code = "import os, recipes; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "passive\n"
