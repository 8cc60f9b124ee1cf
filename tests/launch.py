"""Runs a verb as a user would, in a process of its own or under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from processes import run_python

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
SMALL = ("failures.problems=160", "train.failures_per_step=8", "evaluate.problems=24", "rollout.max_num_seqs=64")
SECONDS = 400


def environment() -> dict[str, str]:
    """One thread per rank, the verbs from any directory, and nothing of a surrounding launch."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(
    verb: str, *arguments: str, ranks: int = 1, succeed: bool = True, path: Path = ROOT, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs a verb to its end (see `run_python`); with `succeed`, a failure shows what it printed."""
    told: dict[str, Any] = {"path": path, "environment": environment(), "seconds": SECONDS, "fresh": fresh}
    done = run_python("-m", f"recipes.{verb}", *arguments, ranks=ranks, **told)
    if succeed:
        assert done.returncode == 0, f"{verb} {arguments}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def start(verb: str, *arguments: str) -> subprocess.Popen[str]:
    told: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-m", f"recipes.{verb}", *arguments], cwd=ROOT, env=environment(), **told)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
