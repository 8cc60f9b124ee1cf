"""nemo_r3 against a peer: a process each, on one model and workload, which take turns.

    workload -> step 0 of each side (a warm-up, not counted), then steps 1, 2, ... of each side in turn
             -> loss of one given batch on both sides, which must agree
             -> a file in benchmarks/results/ and a table

Taking turns, with the other side first each time, lets a slow minute of the machine hit both sides alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, machine, results, versions
from benchmarks.timing import times_as_long
from benchmarks.workload import Sizes, make

Steps = dict[str, list[dict[str, Any]]]
"""The answers of each side, step by step."""
TOLERANCES = {"loss_difference": 1e-5, "grad_norm_difference": 1e-3}
"""The loss's is absolute, the gradient norm's relative: fp32 sums in another order, through all layers."""


def command_line(doc: str, peer: str) -> argparse.ArgumentParser:
    """The options of a comparison with a peer; `doc` is its module's."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads of every side")
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that everything works")
    python = str(ROOT / f".venv-{peer}" / "bin" / "python")
    parser.add_argument(f"--{peer}-python", dest="python", default=python, help="the peer's Python")
    return parser


class Side:
    """One worker process."""

    def __init__(self, name: str, command: list[str], threads: int, logs: Path) -> None:
        """Starts it and waits until it is ready."""
        self._name = name
        self._log = logs / f"{name}.log"
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
        )
        self._read()

    def ask(self, command: str) -> dict[str, Any]:
        """Sends a command and waits for its answer."""
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        return self._read()

    def stop(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._name} ended early:\n{self._log.read_text()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def environment(threads: int) -> dict[str, str]:
    """The same for all sides: threads, nothing compiled, vLLM inside the process, and freed memory kept.

    The last one nemo_r3 does by itself; it spares TRL and verl time in the kernel, too.
    """
    return {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


def compare(
    peer: str,
    worker: str,
    *arguments: str,
    options: argparse.Namespace,
    sizes: Sizes,
    steps: int,
    part: str = "step",
) -> tuple[Steps, dict[str, float]]:
    """The answers of both sides, and what their losses say.

    Args:
        peer: name of the other side.
        worker: its module, which the peer's Python runs.
        arguments: of the worker, behind the workload.
        options: what `command_line` has read.
        sizes: of the model and the workload.
        steps: counted steps.
        part: of a step, whose seconds are printed.
    """
    sides: dict[str, Side] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make(home, sizes, steps)
        given = str(home / "workload.json")
        commands = {
            "r3": [sys.executable, "-m", "benchmarks.r3_worker", given],
            peer: [options.python, "-m", worker, given, *arguments],
        }
        try:
            for name, command in commands.items():
                sides[name] = Side(name, command, options.threads, home)
            return take_turns(sides, steps, part), agreement(sides, peer, home / "policy.safetensors")
        finally:
            for side in sides.values():
                side.stop()


def take_turns(sides: dict[str, Side], steps: int, part: str) -> Steps:
    """Each side's answers, step by step, without the warm-up."""
    found: Steps = {name: [] for name in sides}
    names = list(sides)
    for step in range(steps + 1):
        first = step % len(names)
        for name in names[first:] + names[:first]:
            answer = sides[name].ask(f"step {step}")
            print(f"step {step}  {name:<9}{answer['wall'][part]:8.1f} s", flush=True)
            if step:
                found[name].append(answer)
    return found


def agreement(sides: dict[str, Side], peer: str, weights: Path) -> dict[str, float]:
    """How far the peer's loss, and the norm of its gradient, are from ours on one batch with one set of weights."""
    ours, theirs = (sides[name].ask(f"loss {weights}") for name in ("r3", peer))
    return {
        "loss": ours["loss"],
        "loss_peer": theirs["loss"],
        "loss_kl": ours["kl"],
        "loss_difference": abs(ours["loss"] - theirs["loss"]),
        "grad_norm_difference": abs(ours["grad_norm"] / theirs["grad_norm"] - 1),
    }


def apart(numbers: dict[str, Any]) -> list[str]:
    """What differs by more than it may, whatever its ending."""
    return [
        name for name in numbers for of, most in TOLERANCES.items() if name.startswith(of) and not numbers[name] <= most
    ]


def ratios(found: Steps, peer: str, parts: Sequence[str], ending: str = "") -> dict[str, float]:
    """The peer's wall time over ours: of the medians, and the lowest and highest of the steps done side by side.

    The numbers' names are of a part and `ending`.
    """
    numbers = {}
    for part in parts:
        theirs, ours = ([step["wall"][part] for step in found[side]] for side in (peer, "r3"))
        key = f"{part}_ratio{ending}"
        numbers[key], numbers[f"{key}_low"], numbers[f"{key}_high"] = times_as_long(theirs, ours)
    return numbers


def table(found: Steps, parts: Sequence[str]) -> str:
    """Median seconds of each part, with CPU seconds in brackets."""
    lines = [f"{'median s (CPU s)':<18}" + "".join(f"{part:>17}" for part in parts)]
    for name, steps in found.items():
        cells = []
        for part in parts:
            wall, cpu = (statistics.median(step[clock].get(part, 0.0) for step in steps) for clock in ("wall", "cpu"))
            cells.append(f"{wall:8.2f} ({cpu:.1f})".rjust(17))
        lines.append(f"{name:<18}" + "".join(cells))
    return "\n".join(lines)


def finish(
    file: str, options: argparse.Namespace, packages: Sequence[str], numbers: dict[str, Any], steps: Any
) -> None:
    """Writes the results and prints the numbers; exits with 1 where the losses differ.

    Args:
        file: name of the results.
        options: what `command_line` has read.
        packages: whose versions are recorded.
        numbers: what was found.
        steps: the answers that they were computed from.
    """
    about = {"versions": versions(packages, options.python), "machine": machine(options.threads)}
    out = results(file, options.small)
    out.write_text(json.dumps(numbers | about | {"steps": steps}, indent=2) + "\n")
    print("\n".join(f"{name:<28}{value:.4g}" for name, value in numbers.items() if isinstance(value, float)))
    if differ := apart(numbers):
        raise SystemExit(f"the sides disagree: {', '.join(differ)}")
