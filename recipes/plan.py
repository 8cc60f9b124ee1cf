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
from nemo_r3.models.flops import step_flops, training_cost
from nemo_r3.plan import Plan, describe, plan_of
from nemo_r3.types import Row, UpdateBatch


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
    batch, cost = UpdateBatch(longest_rows(plan)), training_cost(plan.arch)
    balances = [Balance(rows, cost, config.actor.microbatch_tokens) for rows in batch.updates]
    dealt = [balance.deal(plan.data_parallel, config.actor.pipeline_parallel) for balance in balances]
    costs = [balance.all_flops() for balance in balances]
    flops = step_flops(costs, reference=config.algo.kl_beta > 0)
    sampled = len(batch.rows) * (config.rollout.max_reflection_tokens + config.rollout.max_answer_tokens)
    updates = f"an update of {flops:.1e} FLOPs" if len(costs) == 1 else f"{len(costs)} updates, {flops:.1e} FLOPs"
    return (
        f"step      at most {sampled:,} sampled tokens, and {updates}: {flops / plan.ranks:.1e} "
        f"in {sum(len(hands[0]) for hands in dealt)} microbatches on each rank"
    )


def longest_rows(plan: Plan) -> tuple[Row, ...]:
    """The rows of a step whose dialogues fill `rollout.max_model_len` and whose turns are as long as they may be."""
    algo, rollout, train = plan.config.algo, plan.config.rollout, plan.config.train
    trained = sum(map(rollout.token_limit, algo.trained_phases))
    own = rollout.max_reflection_tokens + (rollout.max_answer_tokens if "retry" in algo.trained_phases else 0)
    length = rollout.max_model_len
    shared = length - own if plan.config.actor.shared_context else 0
    weights = [0.0] * (length - trained) + [1.0] * trained
    row = Row(range(length), (), (), weights, weights, weights, shared=shared)
    return tuple(
        replace(row, group=group, update=group * train.updates_per_step // train.failures_per_step)
        for group in range(train.failures_per_step)
        for _ in range(algo.group_size)
    )


if __name__ == "__main__":
    entry.main(plan)
