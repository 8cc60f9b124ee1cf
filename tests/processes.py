"""Runs a script of the tests in processes of its own, and writes programs that stand for others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run_script(
    script: Path, *arguments: object, ranks: int = 1, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script, which may import what tests may; more than one rank goes through torchrun.

    With `check`, a failure shows what it printed.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *torchrun, str(script), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if check:
        assert not done.returncode, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def program(folder: Path, name: str, script: str) -> None:
    """Writes a program: lines of bash."""
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)
