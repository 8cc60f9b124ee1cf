"""A policy update of nemo_r3 against verl's: same model, workload, threads and library versions.

    workload -> nemo_r3 (whole steps, of which only the update counts) and verl (updates): a process each
                  -> step 0 (a warm-up, not counted), then steps 1, 2, ... of each side in turn
                  -> loss of one given batch on both sides, which must agree
             -> benchmarks/results/update_vs_verl.json and a table

An update is the reference's log-probabilities, forward, backward and the optimizer's step. verl also wants the
log-probabilities of the policy before the update. Here it gets them for nothing, as from an engine that returns them;
its default is to compute them once more, which is timed as `old`. Exits with 1 when the losses differ.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.machine import ROOT, machine, results, versions
from benchmarks.sides import apart, compare, ratios, table
from benchmarks.workload import SMALL, Sizes, make

CONTEXTS = 2
STEPS = 3
PARTS = ("update", "reference", "old")
PACKAGES = ("torch", "transformers", "megatron-core", "verl", "tensordict")


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads of both sides")
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that everything works")
    parser.add_argument("--verl-python", default=str(ROOT / ".venv-verl/bin/python"), help="Python that has verl")
    return parser.parse_args()


def main() -> None:
    """Runs it all."""
    args = options()
    sizes = replace(SMALL if args.small else Sizes(), contexts=CONTEXTS)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), sizes, STEPS)
        workload = Path(folder) / "workload.json"
        command = [args.verl_python, "-m", "benchmarks.verl_worker", str(workload)]
        steps, agreed = compare("verl", command, workload, args.threads, STEPS, part="update")
    numbers = ratios(steps, "verl", ("update",)) | agreed
    about = {"sizes": asdict(sizes), "versions": versions(PACKAGES, args.verl_python), "machine": machine(args.threads)}
    out = results("update_vs_verl.json", args.small)
    out.write_text(json.dumps(numbers | about | {"steps": steps}, indent=2) + "\n")
    print(table(steps, PARTS))
    print("\n".join(f"{name:<28}{value:.4g}" for name, value in numbers.items()))
    if differ := apart(agreed):
        raise SystemExit(f"verl and nemo_r3 disagree: {', '.join(differ)}")


if __name__ == "__main__":
    main()
