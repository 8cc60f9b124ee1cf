"""Runs the GPU checks, each in its own process and with a time limit, and prints one table.

    python -m benchmarks.gpu_check [--small] [--device cpu] [--only NAME ...] [--out FILE]

A check that fails, hangs or cannot run here loses no other check's result: the file is rewritten after each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, machine, results


@dataclass(frozen=True)
class Check:
    """A module that measures one thing, as `python -m MODULE --device DEVICE --out FILE [--small]`."""

    name: str  # in the table and for `--only`
    module: str  # what is run
    needs: tuple[str, ...]  # packages it imports
    limit: float  # seconds after which it is stopped
    arguments: tuple[str, ...] = ()  # more of the command line
    memory: float = 0.0  # GiB that its GPU must have


ACTOR = ("torch", "megatron.core")


def update(shape: str, precision: str, lora: bool = False) -> Check:
    """The policy update at a shape in a precision, of all weights or of LoRA."""
    name, arguments = f"{shape}-{precision}", ("--shape", shape, "--precision", precision)
    if lora:
        name, arguments = f"{name}-lora", (*arguments, "--lora")
    module, memory = "benchmarks.gpu_check.update", 0.0 if lora else MEMORY.get(shape, 0.0)
    return Check(name, module, needs_of(precision), 300, arguments, memory)


def fusions(shape: str, precision: str) -> Check:
    """What changes to the update's kernels are worth."""
    arguments = ("--shape", shape, "--precision", precision)
    name = f"{shape}-{precision}-fusions"
    return Check(name, "benchmarks.gpu_check.fusions", needs_of(precision), 400, arguments)


def training(precision: str) -> Check:
    """A hundred steps of training in a precision."""
    needs, arguments = (*needs_of(precision), "vllm"), ("--precision", precision)
    return Check(f"training-{precision}", "benchmarks.gpu_check.training", needs, 400, arguments)


def rollout(shape: str, quantization: str) -> Check:
    """vLLM at a shape: sampling, sleep, refit."""
    arguments = ("--shape", shape, "--quantization", quantization)
    name = f"rollout-{shape}" + ("" if quantization == "none" else f"-{quantization}")
    return Check(name, "benchmarks.gpu_check.rollout", (*ACTOR, "vllm"), 500, arguments)


def needs_of(precision: str) -> tuple[str, ...]:
    """What a policy imports in a precision."""
    return (*ACTOR, "transformer_engine") if "fp8" in precision else ACTOR


MEMORY = {"8b-16": 120.0, "moe": 75.0}
RECIPES = ("fp8-tensorwise", "fp8-blockwise", "fp8-delayed", "mxfp8")
CHECKS = (
    Check("attention", "benchmarks.gpu_check.attention", ACTOR, 240),
    *(update("8b", precision) for precision in ("fp32", "bf16", *RECIPES)),
    *(update("8b", precision, lora=True) for precision in ("fp32", "bf16")),
    *(update("moe", precision, lora) for lora in (False, True) for precision in ("fp32", "bf16")),
    *(update("8b-16", precision) for precision in ("bf16", "fp8-tensorwise", "fp8-delayed")),
    *(fusions("8b", precision) for precision in ("bf16", "fp8-tensorwise")),
    *(training(precision) for precision in ("bf16", *RECIPES)),
    rollout("1b", "none"),
    rollout("8b-full", "none"),
    rollout("moe", "none"),
    *(rollout("8b-full", quantization) for quantization in ("fp8_per_tensor", "fp8_per_block")),
    *(update("1b", precision) for precision in ("fp32", "bf16", *RECIPES)),
)
TAIL = 400
"""Characters of a failed check's output that are kept."""


def missing(needs: tuple[str, ...]) -> list[str]:
    """The packages of `needs` that are not installed."""
    return [name for name in needs if not _installed(name)]


def _installed(name: str) -> bool:
    parents = name.split(".")
    return all(find_spec(".".join(parents[: count + 1])) is not None for count in range(len(parents)))


def run(check: Check, device: str, small: bool) -> dict[str, Any]:
    """Its `status` ("ok", "failed" or "skipped"), `seconds`, and `found` or `reason`; both where it failed midway."""
    absent = missing(check.needs)
    if absent:
        return {"status": "skipped", "seconds": 0.0, "reason": f"not installed: {', '.join(absent)}"}
    if device == "cuda" and not small and (here := _memory()) < check.memory:
        return {"status": "skipped", "seconds": 0.0, "reason": f"needs {check.memory:g} GiB on a GPU, found {here:.0f}"}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        out, log = Path(scratch) / "found.json", Path(scratch) / "log"
        command = [sys.executable, "-m", check.module, "--device", device, "--out", str(out)]
        reason = _wait([*command, *check.arguments] + ["--small"] * small, log, check.limit)
        seconds = time.perf_counter() - begun
        found = json.loads(out.read_text()) if out.exists() else {}
        if reason:
            tail = log.read_text(errors="replace")[-TAIL:].strip()
            return {"status": "failed", "seconds": seconds, "reason": f"{reason}: {tail}", "found": found}
        if "skipped" in found:
            return {"status": "skipped", "seconds": seconds, "reason": found["skipped"]}
        return {"status": "ok", "seconds": seconds, "found": found}


def _has_gpu() -> bool:
    return (
        shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0
    )


def _gpu(asked: str = "name,driver_version") -> str:
    query = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip() if _has_gpu() else ""


def _memory() -> float:
    """GiB of the smallest GPU; 0 without one, unlimited where nvidia-smi cannot tell ("[N/A]")."""
    sizes = [line.strip() for line in _gpu("memory.total").splitlines()]
    return min((float(size) / 1024 if size.isdecimal() else math.inf for size in sizes), default=0.0)


def _wait(command: list[str], log: Path, limit: float) -> str:
    """Runs a command with all it starts; what went wrong, or nothing."""
    with log.open("wb") as to:
        process = subprocess.Popen(command, cwd=ROOT, stdout=to, stderr=to, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {limit:g} s"
    return f"exit code {code}" if code else ""


def row(name: str, result: dict[str, Any]) -> str:
    """A check in one line."""
    numbers = [f"{key} {value:.5g}" for key, value in result.get("found", {}).items()]
    said = "  ".join([*numbers, *([result["reason"]] if "reason" in result else [])])
    return f"{name:30s} {result['status']:8s} {result['seconds']:7.1f} s  {said}"


def main() -> None:
    """Runs what was asked for; exits with 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [check.name for check in CHECKS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these checks")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="where the numbers go")
    options = parser.parse_args()
    out = options.out or results("gpu_check.json", options.small or options.device == "cpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    if options.device == "cuda" and not _has_gpu():
        sys.exit("there is no NVIDIA GPU here (nvidia-smi): --device cpu --small tries the checks themselves")
    found: dict[str, Any] = {}
    for check in CHECKS:
        if check.name in options.only:
            found[check.name] = run(check, options.device, options.small)
            print(row(check.name, found[check.name]), flush=True)
            numbers = {
                "checks": found,
                "device": options.device,
                "small": options.small,
                "machine": machine(1) | {"gpu": _gpu()},
                "command": sys.argv[1:],
            }
            out.write_text(json.dumps(numbers, indent=1) + "\n")
    sys.exit(any(result["status"] == "failed" for result in found.values()))


if __name__ == "__main__":
    main()
