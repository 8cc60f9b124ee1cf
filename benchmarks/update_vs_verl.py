"""A policy update of nemo_r3 against verl's: same model, workload, threads and library versions.

    python -m benchmarks.update_vs_verl [--small]     -> benchmarks/results/update_vs_verl.json and a table

nemo_r3 does whole steps, of which only the update counts; verl does updates. `sides.py` says how they take turns.

An update is the reference's log-probabilities, forward, backward and the optimizer's step. verl also wants the
log-probabilities of the policy before the update. Here it gets them for nothing, as from an engine that returns them;
its default is to compute them once more, which is timed as `old`. Exits with 1 when the losses differ.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from benchmarks.sides import command_line, compare, finish, ratios, table
from benchmarks.workload import SMALL, Sizes

CONTEXTS = 2
STEPS = 3
PACKAGES = ("torch", "transformers", "megatron-core", "verl", "tensordict")


def main() -> None:
    """Runs it all."""
    options = command_line(__doc__, "verl").parse_args()
    sizes = replace(SMALL if options.small else Sizes(), contexts=CONTEXTS)
    worker = "benchmarks.verl_worker"
    steps, agreed = compare("verl", worker, options=options, sizes=sizes, steps=STEPS, part="update")
    print(table(steps, ("update", "reference", "old")))
    numbers = ratios(steps, "verl", ("update",)) | agreed | {"sizes": asdict(sizes)}
    finish("update_vs_verl.json", options, PACKAGES, numbers, steps)


if __name__ == "__main__":
    main()
