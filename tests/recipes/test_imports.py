"""Nothing that reads the environment is imported before `join` prepares it, and nothing slow before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from launch import ROOT

READ_THE_ENVIRONMENT = {"megatron", "transformer_engine", "vllm"}
SLOW = READ_THE_ENVIRONMENT | {"torch", "transformers"}


@pytest.mark.parametrize(
    ("modules", "missing"),
    [
        ("recipes.plan", SLOW),
        ("recipes.train, recipes.mine, recipes.evaluate, recipes.export", SLOW - {"torch"}),
    ],
)
def test_an_import_brings_no_backend(modules: str, missing: set[str]) -> None:
    code = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not missing & set(done.stdout.split())
