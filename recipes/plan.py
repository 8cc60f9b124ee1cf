"""Says what a training run would take of its machines, before there are any: memory, disk, work, and whether it fits.

Reads the config and the model's config.json: no weights, no GPU. Exits with code 2 if the run does not fit.
"""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Sequence
from dataclasses import replace

from nemo_r3 import config as configuration
from nemo_r3 import entry
from nemo_r3.algo.balance import Balance
from nemo_r3.capacity import Node, host_bytes
from nemo_r3.models import planned_architecture
from nemo_r3.models.flops import FORWARD_AND_BACKWARD, training_cost
from nemo_r3.plan import Plan, describe, plan_of
from nemo_r3.types import Row


def plan(argv: Sequence[str]) -> None:
    """`python -m recipes.plan CONFIG.yaml key=value ...`."""
    config = configuration.load(argv)
    arch = planned_architecture(config)
    made = plan_of(config, arch, *this_machine())
    print(f"{describe(made)}\n{describe_step(made)}\n", flush=True)
    made.check()
    print(made.verdict)


def this_machine() -> tuple[Node, str]:
    """For one rank; with its GPU and that one's name, if torch is installed and finds one."""
    gpu, name = 0, ""
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            gpu, name = torch.cuda.mem_get_info()[1], torch.cuda.get_device_name()
    return Node(socket.gethostname(), 1, gpu, host_bytes()), name


def describe_step(plan: Plan) -> str:
    """What a step computes if every turn is as long as it may be and all groups are mixed, in a line."""
    config = plan.config
    rows = longest_rows(plan)
    balance = Balance(rows, training_cost(plan.arch), config.actor.microbatch_tokens)
    dealt = balance.deal(plan.data_parallel, config.actor.pipeline_parallel)
    flops = balance.all_flops(dealt) * (1 + 1 / FORWARD_AND_BACKWARD if config.algo.kl_beta else 1)
    sampled = len(rows) * (config.rollout.max_reflection_tokens + config.rollout.max_answer_tokens)
    return (
        f"step      at most {sampled:,} sampled tokens, and an update of {flops:.1e} FLOPs: {flops / plan.ranks:.1e} "
        f"in {len(dealt[0])} microbatches on each rank"
    )


def longest_rows(plan: Plan) -> list[Row]:
    """The rows of an update whose dialogues fill `rollout.max_model_len` and whose turns are as long as they may be."""
    algo, rollout = plan.config.algo, plan.config.rollout
    limits = {"reflection": rollout.max_reflection_tokens, "retry": rollout.max_answer_tokens}
    trained = sum(limits[phase] for phase in algo.trained_phases)
    own = sum(limits.values()) if "retry" in algo.trained_phases else limits["reflection"]
    length = rollout.max_model_len
    shared = length - own if plan.config.actor.shared_context else 0
    weights = [0.0] * (length - trained) + [1.0] * trained
    row = Row(range(length), (), (), weights, weights, weights, shared=shared)
    return [
        replace(row, group=group)
        for group in range(plan.config.train.failures_per_step)
        for _ in range(algo.group_size)
    ]


if __name__ == "__main__":
    entry.main(plan)
