"""What docs/training.md says about memory, computed: `python tests/plans.py` rewrites it."""

from __future__ import annotations

import math
from pathlib import Path

from paper_models import shape

from nemo_r3.capacity import OWN_BYTES, Node
from nemo_r3.config import Config, load
from nemo_r3.plan import ASSUMED_BYTES, Plan, plan_of
from nemo_r3.units import GIB
from recipes.plan import describe, describe_step

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "training.md"
SHOWN = ("configs/countdown-llama-3.1-8b-1n8g-tp2dp4.yaml", "cluster.memory_gb=1800")
HEADINGS = (
    "| model and layout | actor during the update | actor + half a GPU for vLLM | the same with `offload_optimizer` |"
)
LAYOUTS = {  # the model, tensor and pipeline parallel, GPUs, rollout.tensor_parallel
    "Qwen2.5-1.5B, one GPU": ("qwen2.5-1.5b", 1, 1, 1, 1),
    "Qwen2.5-1.5B, DP8": ("qwen2.5-1.5b", 1, 1, 8, 1),
    "Llama-3.2-3B, one GPU": ("llama-3.2-3b", 1, 1, 1, 1),
    "Qwen2.5-3B, DP8": ("qwen2.5-3b", 1, 1, 8, 1),
    "Llama-3.2-3B, DP8": ("llama-3.2-3b", 1, 1, 8, 1),
    "Phi-3.5-mini, DP8": ("phi-3.5-mini", 1, 1, 8, 1),
    "Qwen2.5-7B, TP2 DP4": ("qwen2.5-7b", 2, 1, 8, 1),
    "Llama-3.1-8B, TP4 DP1, 4 GPUs": ("llama-3.1-8b", 4, 1, 4, 1),
    "Llama-3.1-8B, TP2 DP4": ("llama-3.1-8b", 2, 1, 8, 1),
    "Qwen2.5-32B, TP8 DP2, 16 GPUs, `rollout.tensor_parallel=4`": ("qwen2.5-32b", 8, 1, 16, 4),
    "Llama-3.1-70B, TP8 PP4, 32 GPUs, `rollout.tensor_parallel=8`": ("llama-3.1-70b", 8, 4, 32, 8),
    "Llama-3.1-70B, TP8 PP4 DP2, 64 GPUs, `rollout.tensor_parallel=8`": ("llama-3.1-70b", 8, 4, 64, 8),
}


def plan_shown() -> str:
    plan = plan_of(load([str(ROOT / SHOWN[0]), *SHOWN[1:]]), shape("llama-3.1-8b"))
    plan.check()
    return f"```text\n{describe(plan)}\n{describe_step(plan)}\n\n{plan.verdict}\n```"


def row(name: str) -> str:
    """A layout's row: whole GiB of a GPU of 79, of which CUDA takes 2."""
    model, tensor, pipeline, ranks, engine = LAYOUTS[name]
    config = Config()
    config.actor.tensor_parallel, config.actor.pipeline_parallel = tensor, pipeline
    config.rollout.tensor_parallel = engine
    plan = Plan(config, shape(model), Node("node", ranks, ASSUMED_BYTES, math.inf))
    both = plan.size.at_work + plan.share
    cells = [f"{count / GIB:.0f}" for count in (plan.size.at_work, both, plan.size.weights + plan.share)]
    cells[1] += ": too much" if both > ASSUMED_BYTES - OWN_BYTES else ""
    return f"| {' | '.join([name, *cells])} |"


def rewritten(page: str) -> str:
    table = "\n".join([HEADINGS, "|---|---|---|---|", *map(row, LAYOUTS)])
    for name, text in (("plan", plan_shown()), ("layouts", table)):
        begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
        before, rest = page.split(begin)
        page = before + begin + text + end + rest.split(end.lstrip("\n"))[1]
    return page


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
