"""`launch`: `python -m slurm.launch` in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from slurm.launch import main

ROOT = Path(__file__).parents[2]


def launch(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m slurm.launch`, in this process: another one would import for seconds."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    out, err = StringIO(), StringIO()
    with (
        patch.dict(os.environ, environment or kept, clear=True),
        chdir(ROOT),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        code = main(arguments)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def launch_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """With `--local`, what the stages print is on the console of a process."""
    command = [sys.executable, "-m", "slurm.launch", *arguments, "--local"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
