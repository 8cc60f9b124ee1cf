"""`Plan`: what a training run takes of its machines, from its config and the model's config.json alone. No torch.

Whether that fits is for nemo_r3.capacity to say, as it will at the start of the run itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from nemo_r3.activations import activation_bytes
from nemo_r3.capacity import OWN_BYTES, Node, Size, checkpoint_bytes, export_bytes, memory_problem, size_of
from nemo_r3.config import Config, check_world
from nemo_r3.config.schema import show as value_text
from nemo_r3.errors import ConfigError
from nemo_r3.fp8_support import check_dimensions
from nemo_r3.models import Architecture, check_layout
from nemo_r3.models.names import count_parameters
from nemo_r3.units import GIB, show

ASSUMED, ASSUMED_BYTES = "assumed: cluster.gpu_memory_gb", 79 * GIB
"""What CUDA has of a GPU that is sold as 80 GB."""
SAVE_ACTIVATIONS = "set actor.recompute=full, lower actor.microbatch_tokens or raise actor.tensor_parallel"
MORE_NODES = (1, 2, 4, 8)
"""Times so many nodes are tried."""
SMALL_BYTES = 4 * GIB
NAMES = 32
"""Columns for what the memory is for."""


@dataclass(frozen=True)
class Plan:
    """A config's layout on nodes that are all alike."""

    config: Config
    arch: Architecture
    node: Node  # each of the nodes
    source: str = ""  # how the size of a GPU is known

    @property
    def ranks(self) -> int:
        """Of all nodes."""
        return self.config.cluster.nodes * self.node.ranks

    @property
    def data_parallel(self) -> int:
        """How many copies of the actor there are."""
        return self.ranks // (self.config.actor.tensor_parallel * self.config.actor.pipeline_parallel)

    @cached_property
    def size(self) -> Size:
        """What a rank holds."""
        return size_of(self.config, self.arch, self.ranks)

    @property
    def share(self) -> float:
        """Bytes of each GPU that vLLM takes."""
        return self.config.rollout.gpu_memory_utilization * self.node.gpu

    @property
    def cached_tokens(self) -> int:
        """How many tokens the KV cache of an engine on GPUs holds, if vLLM needs no memory to work with."""
        return max(0, int((self.share - self.size.engine) // self.size.token))

    @property
    def left(self) -> float:
        """Bytes of each GPU that the update has for activations."""
        return self.node.gpu - OWN_BYTES - self.size.at_work - (0 if self.config.rollout.sleep else self.share)

    @property
    def activations(self) -> float:
        """About how many of them it takes, where microbatches are full and all their tokens trained."""
        tokens = self.config.actor.microbatch_tokens
        return activation_bytes(self.config, self.arch, tokens, trained=tokens)

    @property
    def verdict(self) -> str:
        """A line about what `check` does not refuse."""
        if not self.node.gpu:
            return "fits, if what is left of the host memory is enough for activations"
        left, takes = f"{self.left / GIB:.0f} GiB of each GPU are left", f"about {self.activations / GIB:.0f}"
        if self.activations > self.left:
            verdict = f"fits but for activations: {left}, they take {takes}; {SAVE_ACTIVATIONS}"
        else:
            verdict = f"fits: {left} for activations, which take {takes}"
        if math.isinf(self.node.host):
            verdict += "; host memory is not checked (cluster.memory_gb=0)"
        ranks, actor, rollout = self.node.ranks, self.config.actor, self.config.rollout
        for name, size in (("actor", actor.tensor_parallel), ("rollout", rollout.tensor_parallel)):
            if self.config.cluster.nodes > 1 and ranks % size:
                verdict += (
                    f"; {name}.tensor_parallel={size} leaves a node of {ranks} GPUs: each layer waits for the network"
                )
        return verdict

    def check(self) -> None:
        """Refuses a training run that cannot fit.

        Raises:
            ConfigError: in the words of the run that would refuse it, and the nearest settings that fit.
        """
        if (problem := memory_problem(self.config, self.size, self.node)) is None:
            return
        if self.source == ASSUMED:
            problem += f"; GPUs of {self.node.gpu / GIB:.0f} GiB are assumed (cluster.gpu_memory_gb)"
        if settings := self.nearest():
            problem += "; this fits: " + " ".join(f"{key}={value_text(value)}" for key, value in settings.items())
        raise ConfigError(problem)

    def nearest(self) -> dict[str, Any]:
        """The nearest layout that fits, as settings that differ; empty if none is found."""
        return next(filter(self._fits_with, self._changes()), {})

    def _fits_with(self, settings: Mapping[str, Any]) -> bool:
        other = replace(self, config=_changed(self.config, settings))
        try:
            check_world(other.config, other.ranks)
            check_layout(other.config, self.arch)
            check_dimensions(other.config, self.arch)
        except ConfigError:
            return False
        return memory_problem(other.config, other.size, self.node) is None

    def _changes(self) -> Iterator[dict[str, Any]]:
        """Changes that save memory. The last setting varies first: offloading before layouts, nodes at the very end."""
        actor, rollout, cluster = self.config.actor, self.config.rollout, self.config.cluster
        choices: dict[str, list[Any]] = {
            "cluster.nodes": [cluster.nodes * more for more in (MORE_NODES if cluster.gpus_per_node else (1,))],
            "actor.pipeline_parallel": _multiples(actor.pipeline_parallel, self.arch.num_layers),
            "actor.tensor_parallel": _multiples(actor.tensor_parallel, self.node.ranks),  # within a node
            "rollout.tensor_parallel": _multiples(rollout.tensor_parallel, self.node.ranks),
            "actor.offload_optimizer": sorted({actor.offload_optimizer, True}),
        }
        for values in itertools.product(*choices.values()):
            pairs = zip(choices.items(), values, strict=True)
            yield {key: value for (key, allowed), value in pairs if value != allowed[0]}


def plan_of(config: Config, arch: Architecture, here: Node | None = None, gpu_name: str = "") -> Plan:
    """The plan of a config; what it leaves open is as on this machine (`here`), unless the run is for others alone.

    Raises:
        ConfigError: the layout does not fit the model, its FP8 or the ranks.
    """
    check_layout(config, arch)
    check_dimensions(config, arch)
    cluster, actor = config.cluster, config.actor
    fewest = math.lcm(actor.tensor_parallel * actor.pipeline_parallel, config.rollout.tensor_parallel)
    ranks = cluster.gpus_per_node or -(-fewest // cluster.nodes)
    check_world(config, cluster.nodes * ranks)
    name, gpu, host, source = "each node", 0.0, math.inf, ""
    if cluster.memory_gb:
        host = cluster.memory_gb * float(GIB)
    elif here is not None and not cluster.gpus_per_node:  # the ranks are to be launched here
        name, host = here.name, here.host
    if cluster.gpu_memory_gb:
        gpu, source = cluster.gpu_memory_gb * GIB, "cluster.gpu_memory_gb"
    elif here is not None and here.gpu:
        gpu, source = here.gpu, gpu_name
    elif cluster.gpus_per_node:
        gpu, source = ASSUMED_BYTES, ASSUMED
    return Plan(config, arch, Node(name, ranks, gpu, host), source)


def describe(plan: Plan) -> str:
    """A plan as text, without a verdict."""
    config, size, node = plan.config, plan.size, plan.node
    actor, rollout, nodes = config.actor, config.rollout, config.cluster.nodes
    gpus = f"each with a GPU of {node.gpu / GIB:.0f} GiB ({plan.source})" if node.gpu else "without GPUs"
    sequence = " with sequence parallel" if actor.sequence_parallel else ""
    kept, each = config.train.keep_checkpoints, checkpoint_bytes(config, plan.arch)
    engines, groups = plan.ranks // rollout.tensor_parallel, config.train.failures_per_step
    idle = f", {engines - groups} of them idle (train.failures_per_step={groups})" if groups < engines else ""
    lines = [
        f"model     {config.model.path}: {count_parameters(plan.arch) / 1e6:,.1f}M parameters, {actor.precision}",
        f"ranks     {plan.ranks} on {_number(nodes, 'node')}, {gpus}",
        f"actor     tensor parallel {actor.tensor_parallel}{sequence}, pipeline parallel {actor.pipeline_parallel}, "
        f"data parallel {plan.data_parallel}",
        f"rollout   {_number(engines, 'engine')} of {_number(rollout.tensor_parallel, 'rank')}{idle}",
        "",
        *(_on_gpus(plan) if node.gpu else _on_a_cpu(plan)),
        f"disk      {kept + 1} x {show(each)}: train.keep_checkpoints={kept}, and the one being written",
        f"refit     {show(size.engine * rollout.tensor_parallel)} of weights into each engine, once per step",
        f"export    {show(export_bytes(plan.arch))} of host memory for rank 0",
    ]
    return "\n".join(lines)


def _on_gpus(plan: Plan) -> list[str]:
    size, node, rollout = plan.size, plan.node, plan.config.rollout
    cache, asleep = plan.share - size.engine, rollout.sleep
    rows: list[tuple[Any, ...]] = [
        ("weights", size.weights, size.weights, size.weights),
        ("gradients", size.gradients, size.gradients, 0),
        ("optimizer state", size.optimizer, size.optimizer, 0),
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
        f"host      {show(saved)} of each node to save, {show(away)} to offload "
        f"(actor.offload_optimizer={value_text(offloads)}); {_has(node)}",
    ]


def _on_a_cpu(plan: Plan) -> list[str]:
    size, config, node = plan.size, plan.config, plan.node
    rows = [
        ("weights", size.weights),
        ("gradients", size.gradients),
        ("optimizer state", size.optimizer),
        ("its buffers, offloading", size.optimizer if config.actor.offload_optimizer else 0),
        ("reference", size.reference),
        ("copies for a save", size.saved if config.train.save_in_background else 0),
        ("vLLM's weights", size.engine),
        ("vLLM's KV cache, at most", config.rollout.cpu_kv_cache_gb * GIB / config.rollout.tensor_parallel),
    ]
    *checked, cache = (count for _, count in rows)
    return [
        *_table("each rank's host memory", ("",), [*rows, ("together", sum(checked) + cache)]),
        "",
        f"host      {show(node.ranks * sum(checked))} of each node before activations and KV cache; {_has(node)}",
    ]


def _has(node: Node) -> str:
    return "it has " + ("an unknown amount (cluster.memory_gb=0)" if math.isinf(node.host) else show(node.host))


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


def _multiples(value: int, limit: int) -> list[int]:
    """Of those that divide the limit, and the value itself, which comes first."""
    return [value, *(more for more in range(2 * value, limit + 1, value) if limit % more == 0)]


def _changed(config: Config, settings: Mapping[str, Any]) -> Config:
    other = deepcopy(config)
    for key, value in settings.items():
        section, name = key.split(".")
        setattr(getattr(other, section), name, value)
    return other
