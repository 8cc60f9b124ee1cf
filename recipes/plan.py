"""Says what a training run would take of its machines, before there are any: memory, disk, work, and whether it fits.

Reads the config and the model's config.json: no weights, no GPU. Exits with code 2 if the run does not fit, or
`train.start_from` is not there.
"""

from __future__ import annotations

import importlib.util
import math
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_r3 import config as configuration
from nemo_r3 import entry
from nemo_r3.actor.manifest import check_start
from nemo_r3.algo.balance import Balance
from nemo_r3.capacity import OWN_BYTES, Node, checkpoint_bytes, export_bytes, host_bytes
from nemo_r3.config.schema import show
from nemo_r3.models import planned_architecture
from nemo_r3.models.flops import scoring_cost, step_flops, training_cost
from nemo_r3.models.names import count_factors, count_parameters
from nemo_r3.plan import Plan, plan_of
from nemo_r3.types import Row, UpdateBatch
from nemo_r3.units import GIB, in_words

SMALL_BYTES = 4 * GIB
FACTORS = "LoRA's factors and their state"
NAMES = 32
"""Columns for what the memory is for."""


def plan(argv: Sequence[str]) -> None:
    """`python -m recipes.plan CONFIG.yaml key=value ...`."""
    config = configuration.load(argv)
    arch = planned_architecture(config)
    made = plan_of(config, arch, *this_machine())
    print(f"{describe(made)}\n{describe_step(made)}\n", flush=True)
    made.check()
    print(made.verdict, flush=True)
    check_start(config.train.start_from, Path(config.run.dir, "checkpoints"))


def this_machine() -> tuple[Node, str]:
    """For one rank; with its GPU and that one's name, if torch is installed and finds one."""
    gpu, name = 0, ""
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            gpu, name = torch.cuda.mem_get_info()[1], torch.cuda.get_device_name()
    return Node(socket.gethostname(), 1, gpu, host_bytes()), name


def describe(plan: Plan) -> str:
    """A plan as text, without a verdict."""
    config, size, node = plan.config, plan.size, plan.node
    actor, rollout, nodes = config.actor, config.rollout, config.cluster.nodes
    gpus = f"each with a GPU of {node.gpu / GIB:.0f} GiB ({plan.source})" if node.gpu else "without GPUs"
    sequence = " with sequence parallel" if actor.sequence_parallel else ""
    experts = f", expert parallel {actor.expert_parallel}" if plan.arch.experts else ""
    kept, each = config.train.keep_checkpoints, checkpoint_bytes(config, plan.arch)
    engines, groups = plan.ranks // rollout.tensor_parallel, config.train.failures_per_step
    idle = f", {engines - groups} of them idle (train.failures_per_step={groups})" if groups < engines else ""
    counted = f"{count_parameters(plan.arch) / 1e6:,.1f}M parameters, {actor.precision}"
    if actor.lora_rank:
        counted += f"; {count_factors(plan.arch, actor.lora_rank) / 1e6:,.2f}M of LoRA"
    lines = [
        f"model     {config.model.path}: {counted}",
        f"ranks     {plan.ranks} on {_number(nodes, 'node')}, {gpus}",
        f"actor     tensor parallel {actor.tensor_parallel}{sequence}, pipeline parallel {actor.pipeline_parallel}, "
        f"data parallel {plan.data_parallel}{experts}",
        f"rollout   {_number(engines, 'engine')} of {_number(rollout.tensor_parallel, 'rank')}{idle}",
        "",
        *(_on_gpus(plan) if node.gpu else _on_a_cpu(plan)),
        f"disk      {kept + 1} x {in_words(each)}: train.keep_checkpoints={kept}, and the one being written",
        f"refit     {in_words(size.engine * rollout.tensor_parallel)} of weights into each engine, once per step",
        f"export    {in_words(export_bytes(plan.arch))} of host memory for rank 0",
    ]
    return "\n".join(lines)


def _on_gpus(plan: Plan) -> list[str]:
    size, node, rollout = plan.size, plan.node, plan.config.rollout
    cache, asleep = plan.share - size.engine, rollout.sleep
    rows: list[tuple[Any, ...]] = [
        ("weights", size.weights, size.weights, size.weights),
        ("gradients", size.gradients, size.gradients, 0),
        ("optimizer state", size.optimizer, size.optimizer, 0),
        *([(FACTORS, size.factors, size.factors, size.factors)] if size.factors else []),
        ("reference", size.reference, size.reference, 0),
        ("vLLM's weights", 0 if asleep else size.engine, size.engine, size.engine),
        ("vLLM's KV cache, at most", 0 if asleep else cache, cache, cache),
        ("CUDA, NCCL and kernels", OWN_BYTES, OWN_BYTES, OWN_BYTES),
    ]
    held = [sum(row[column] for row in rows) for column in (1, 2, 3)]
    sums = [("together", *held), ("left", *(node.gpu - each for each in held))]
    sums.append(("activations, about", plan.activations, 0, 0))
    offloads = plan.config.actor.offload_optimizer
    dialogues = plan.cached_tokens // rollout.max_model_len
    saved, away = node.ranks * size.saved, node.ranks * size.offloaded
    return [
        *_table("each GPU", ("update", "rollout", "rollout, offloading"), [*rows, *sums]),
        "",
        f"KV cache  at most {plan.cached_tokens:,} tokens of an engine: {dialogues:,} whole dialogues of "
        f"rollout.max_model_len={rollout.max_model_len}",
        f"host      {in_words(saved)} of each node to save, {in_words(away)} to offload "
        f"(actor.offload_optimizer={show(offloads)}); {_has(node)}",
    ]


def _on_a_cpu(plan: Plan) -> list[str]:
    size, config, node = plan.size, plan.config, plan.node
    rows = [
        ("weights", size.weights),
        ("gradients", size.gradients),
        ("optimizer state", size.optimizer),
        ("its buffers, offloading", size.optimizer if config.actor.offload_optimizer else 0),
        *([(FACTORS, size.factors)] if size.factors else []),
        ("reference", size.reference),
        ("copies for a save", size.saved if config.train.save_in_background else 0),
        ("vLLM's weights", size.engine),
        ("vLLM's KV cache, at most", config.rollout.cpu_kv_cache_gb * GIB / config.rollout.tensor_parallel),
    ]
    *checked, cache = (count for _, count in rows)
    return [
        *_table("each rank's host memory", ("",), [*rows, ("together", sum(checked) + cache)]),
        "",
        f"host      {in_words(node.ranks * sum(checked))} of each node before activations and KV cache; {_has(node)}",
    ]


def _has(node: Node) -> str:
    return "it has " + ("an unknown amount (cluster.memory_gb=0)" if math.isinf(node.host) else in_words(node.host))


def _table(of: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> list[str]:
    """Bytes under their columns, as GiB or, of a small model, as MiB."""
    widths = [max(len(column), 8) + 2 for column in columns]
    unit, name = (GIB, "GiB") if max(max(counts) for _, *counts in rows) > SMALL_BYTES else (2**20, "MiB")

    def line(what: str, cells: Sequence[str]) -> str:
        return what.ljust(NAMES) + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    lines = [line(f"{name} of {of}", columns)]
    for what, *counts in rows:
        lines.append(line(f"  {what}", [f"{count / unit:,.1f}" if count else "-" for count in counts]))
    return lines


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def describe_step(plan: Plan) -> str:
    """What a step computes if every turn is as long as it may be and all groups are mixed, in a line.

    A stage of a pipeline idles while the others have the first and the last microbatches (arXiv 2104.04473, 2.2.1).
    """
    config = plan.config
    batch, cost = UpdateBatch(longest_rows(plan)), training_cost(plan.arch, config.actor.lora_rank > 0)
    balances = [Balance(rows, cost, config.actor.microbatch_tokens) for rows in batch.updates]
    dealt = [balance.deal(plan.data_parallel, config.actor.pipeline_parallel) for balance in balances]
    costs = [(balance.all_flops(cost), balance.all_flops(scoring_cost(plan.arch))) for balance in balances]
    flops = step_flops(costs, reference=config.algo.kl_beta > 0)
    sampled = len(batch.rows) * (config.rollout.max_reflection_tokens + config.rollout.max_answer_tokens)
    updates = f"an update of {flops:.1e} FLOPs" if len(costs) == 1 else f"{len(costs)} updates, {flops:.1e} FLOPs"
    microbatches, idle = sum(len(hands[0]) for hands in dealt), len(dealt) * (config.actor.pipeline_parallel - 1)
    return (
        f"step      at most {sampled:,} sampled tokens, and {updates}: {flops / plan.ranks:.1e} "
        f"in {microbatches} microbatches on each rank"
        + (f"; its pipeline stage idles for {idle / (microbatches + idle):.0%} of the time" if idle else "")
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
