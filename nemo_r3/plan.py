"""`Plan`: what a training run takes of its machines, from its config and the model's config.json alone. No torch.

Whether that fits is for nemo_r3.capacity to say, as it will at the start of the run itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from nemo_r3.capacity import OWN_BYTES, Node, Size, memory_problem, size_of
from nemo_r3.config import Config, check_world, fewest_ranks
from nemo_r3.config.schema import show
from nemo_r3.errors import ConfigError
from nemo_r3.fp8_support import check_dimensions
from nemo_r3.models import Architecture, check_layout
from nemo_r3.precision import precision_of
from nemo_r3.units import GIB

ASSUMED, ASSUMED_BYTES = "assumed: cluster.gpu_memory_gb", 79 * GIB
"""What CUDA has of a GPU that is sold as 80 GB."""
SAVE_ACTIVATIONS = "set actor.recompute=full, lower actor.microbatch_tokens or raise actor.tensor_parallel"
MORE_NODES = (1, 2, 4, 8)
"""Times so many nodes are tried."""
HEAD_LOGITS = 2**28
"""In a chunk of the head on a GPU, see nemo_r3.actor.head."""


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
        for name, size in (
            ("actor.tensor_parallel", actor.tensor_parallel),
            ("actor.expert_parallel", actor.expert_parallel),
            ("rollout.tensor_parallel", rollout.tensor_parallel),
        ):
            if ranks % size:
                verdict += f"; {name}={size} leaves a node of {ranks} GPUs: each layer waits for the network"
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
            problem += "; this fits: " + " ".join(f"{key}={show(value)}" for key, value in settings.items())
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
            "actor.expert_parallel": _multiples(
                actor.expert_parallel, self.arch.experts.count if self.arch.experts else 1
            ),
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
    cluster = config.cluster
    ranks = cluster.gpus_per_node or -(-fewest_ranks(config) // cluster.nodes)
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


def _multiples(value: int, limit: int) -> list[int]:
    """Of those that divide the limit, and the value itself, which comes first."""
    return [value, *(more for more in range(2 * value, limit + 1, value) if limit % more == 0)]


def _changed(config: Config, settings: Mapping[str, Any]) -> Config:
    for key, value in settings.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def activation_bytes(config: Config, arch: Architecture, tokens: int, trained: int) -> float:
    """About how many bytes an update's activations take with Transformer Engine's layers, on the stage that needs most.

    A microbatch has `tokens`, of which `trained` carry loss. The peak is where the backward pass begins: a layer has
    kept `kept` numbers of each token, or with full recompute its input alone, and the head runs, or the last layer
    again. FP8's own copies are not counted.

    At 8 layers of an 8B in BF16 this is 3 % below what an H200 was measured to take (docs/log.md). With recompute, and
    on several GPUs, nothing has been measured yet.
    """
    actor, stages, width = config.actor, config.actor.pipeline_parallel, precision_of(config).width
    full = actor.recompute == "full"
    inputs, kept, working = (width * tokens * count for count in _per_token(config, arch))
    layers = arch.num_layers // stages
    stack = layers * (inputs if full else kept)
    again = (kept if full else 0) + working
    # the first stage has as many microbatches under way as there are stages, the last has one and the head
    return max(stages * stack + again, stack + max(_head(config, arch, trained), again))


def _per_token(config: Config, arch: Architecture) -> tuple[float, float, float]:
    """Numbers that a rank holds of a token: a layer's input, all that the layer keeps, and its gradients at work."""
    ways = config.actor.tensor_parallel
    whole = arch.hidden_size / (ways if config.actor.sequence_parallel else 1)
    queries, keys = arch.query_width / ways, arch.key_width / ways
    # gate and up, and their product; of each expert that a token passes, its input, too
    copies = arch.experts.per_token * config.actor.expert_tensor_parallel if arch.experts else 0
    feed = (3 * arch.active_columns + copies * arch.hidden_size) / ways
    # residual stream and norm, twice; rotated query and key, value, output
    kept = 4 * whole + 2 * queries + 2 * keys + feed
    return whole, kept, 2 * whole + feed


def _head(config: Config, arch: Architecture, trained: int) -> float:
    """Two chunks of logits, and unless LoRA freezes it, the weight's gradient: of several its sum in float32, too."""
    ways, width = config.actor.tensor_parallel, precision_of(config).width
    rows = arch.padded_vocab(ways) // ways
    chunk = min(trained, HEAD_LOGITS // rows)
    gradient = 0 if config.actor.lora_rank else rows * arch.hidden_size * (width if chunk == trained else width + 4)
    return 2 * width * chunk * rows + gradient
