"""Reflect, retry, reward for real: `recipes.train` on the embedded model in one precision, all of it on the device.

The embedded model's matrices are multiples of 128, as every FP8 recipe wants. `retry_success` is the mean of the last
steps, `plus_minus` half of its 95 % interval over those steps.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import command_line
from benchmarks.machine import ROOT

STEPS, LAST = 100, 20
SMALL = ("failures.problems=160", "train.failures_per_step=8", "rollout.max_num_seqs=64")
REFUSED = 2
"""Exit code of a recipe that cannot run with these settings, or here; before its first step, that is."""


def run(precision: str, small: bool, home: Path, *more: str) -> dict[str, Any]:
    """What is found, or `skipped` with the reason."""
    steps = 2 if small else STEPS
    settings = [f"actor.precision={precision}", f"run.dir={home}", f"train.steps={steps}", f"train.save_every={steps}"]
    command = [sys.executable, "-W", "ignore", "-m", "recipes.train", "configs/quickstart.yaml", *settings]
    begun = time.perf_counter()
    done = subprocess.run([*command, *(SMALL if small else ()), *more], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - begun
    if done.returncode == REFUSED and not (home / "metrics.jsonl").exists():
        return {"skipped": done.stderr.strip().splitlines()[-1].removeprefix("error: ")}
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    return summary(lines) | {"seconds": seconds}


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a run's metrics say; steps without an update have no loss."""
    last = [line["retry_success"] for line in lines[-LAST:]]
    updated = [line for line in lines if line["loss"] is not None]
    return {
        "steps": float(len(lines)),
        "first_retry_success": statistics.fmean(line["retry_success"] for line in lines[:LAST]),
        "retry_success": statistics.fmean(last),
        "plus_minus": 1.96 * statistics.stdev(last) / len(last) ** 0.5,
        "loss": statistics.fmean(line["loss"] for line in updated[-LAST:]),
        "prob_error": statistics.median(line["token_mult_prob_error"] for line in updated),
        "skipped_updates": sum(line["skipped"] for line in updated),
        "rollout_seconds": statistics.median(line["time/rollout"] for line in lines),
        "update_seconds": statistics.median(line["time/update"] for line in updated),
        "refit_seconds": statistics.median(line["time/refit"] for line in lines if "time/refit" in line),
    }


def main() -> None:
    """Writes what was found as JSON."""
    parser = command_line(__doc__)
    parser.add_argument("--precision", default="bf16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        options.out.write_text(json.dumps(run(options.precision, options.small, Path(home))))


if __name__ == "__main__":
    main()
