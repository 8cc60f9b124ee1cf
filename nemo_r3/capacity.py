"""Estimates whether a run fits its machines, before any weight is read: in a run, and in a plan, so without torch.

GPU    weights, gradients, optimizer state and reference, beside vLLM's share; activations are not counted
host   what is being written to a checkpoint, and what is offloaded; without GPUs all of the actor and vLLM's weights
disk   the checkpoints that are kept, and the one being written
"""

from __future__ import annotations

import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_r3.actor.manifest import WRITING, step_of, steps_in
from nemo_r3.config import Config
from nemo_r3.errors import ConfigError
from nemo_r3.models import Architecture
from nemo_r3.models.names import count_changed, count_factors, count_parameters
from nemo_r3.precision import precision_of
from nemo_r3.units import GIB, in_words

if TYPE_CHECKING:
    from nemo_r3.runtime import World  # torch

OWN_BYTES = 2 * GIB
"""Taken by CUDA, NCCL and kernels on each GPU."""
OPTIMIZER_BYTES = 12
"""Per parameter in a checkpoint: fp32 main weights and AdamW's two moments."""
CGROUPS = Path("/sys/fs/cgroup")
LIMITS = ("memory.max", "memory.limit_in_bytes")
"""The file names of cgroup v2 and v1."""


@dataclass(frozen=True)
class Size:
    """Bytes of one rank of the actor, on the pipeline stage that holds most."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    saved: float  # its part of a checkpoint, on average
    engine: float  # vLLM's weights, on each rank of an engine
    token: float  # a token's part of the KV cache, on each rank of an engine
    factors: float = 0.0  # LoRA's, with their gradients and AdamW's state, which are never offloaded
    experts: bool = False  # whether the model has any

    @property
    def at_work(self) -> float:
        """On the device during an update, without activations."""
        return self.at_rest + self.gradients + self.optimizer + self.reference

    @property
    def at_rest(self) -> float:
        """On the device between updates, with `actor.offload_optimizer`."""
        return self.weights + self.factors

    @property
    def offloaded(self) -> float:
        """In host memory, with `actor.offload_optimizer`."""
        return self.optimizer + self.reference


@dataclass(frozen=True)
class Node:
    """One of the machines of a run."""

    name: str  # what messages call it
    ranks: int  # how many of the run's ranks it has
    gpu: float  # bytes of each rank's GPU; 0 if there are none
    host: float  # bytes of host memory for the run; infinite if nobody knows


def size_of(config: Config, arch: Architecture, world_size: int) -> Size:
    """What one rank of the actor holds in this layout."""
    actor, precision = config.actor, precision_of(config)
    stage = _largest_stage(arch, actor.pipeline_parallel)
    experts = count_parameters(arch, experts_only=True) / actor.pipeline_parallel
    share = (stage - experts) / actor.tensor_parallel
    share += experts / actor.expert_parallel / actor.expert_tensor_parallel
    owners = world_size // (actor.tensor_parallel * actor.pipeline_parallel)
    state = OPTIMIZER_BYTES if precision.bf16 else OPTIMIZER_BYTES - 4  # fp32's main weights are the model's
    lora = actor.lora_rank > 0
    factors = count_factors(arch, actor.lora_rank, actor.tensor_parallel) / actor.pipeline_parallel
    trained = count_changed(arch) / actor.tensor_parallel / actor.pipeline_parallel if lora else share
    return Size(
        weights=precision.width * share,
        gradients=0 if lora else 4 * share,
        optimizer=0 if lora else state * stage / actor.tensor_parallel / owners,
        reference=precision.width * trained if config.algo.kl_beta or lora else 0,
        saved=checkpoint_bytes(config, arch) / world_size,
        engine=precision.width * count_parameters(arch) / config.rollout.tensor_parallel,
        token=arch.cached_bytes(config.rollout.tensor_parallel, precision.width),
        factors=(4 + OPTIMIZER_BYTES) * factors,
        experts=arch.experts is not None,
    )


def _largest_stage(arch: Architecture, stages: int) -> int:
    """Parameters of the pipeline stage that holds most: the last has its own copy of a tied embedding."""
    if stages == 1:
        return count_parameters(arch)
    whole = count_parameters(replace(arch, num_layers=arch.num_layers // stages))
    return whole if arch.tied else whole - arch.vocab_size * arch.hidden_size


def check(config: Config, arch: Architecture, world: World, checkpoints: Path) -> None:
    """Refuses a training run that cannot fit; every rank calls it. The run's `checkpoints` need not exist.

    Raises:
        ConfigError: naming what does not fit, by how much, and the settings that change that.
    """
    host = socket.gethostname()
    node = Node(host, world.gather(host).count(host), world.gpu_bytes, host_bytes())
    problem = memory_problem(config, size_of(config, arch, world.size), node)
    if world.is_main:
        problem = problem or disk_problem((config, arch, checkpoints))
    if problems := [problem for problem in world.gather(problem) if problem]:
        raise ConfigError(problems[0])


def memory_problem(config: Config, size: Size, node: Node) -> str | None:
    """Why a node's ranks cannot share its memory, or None."""
    if not node.gpu:
        return cpu_problem(config, size, node)
    return gpu_problem(config, size, node.gpu) or host_problem(config, size, node)


def gpu_problem(config: Config, size: Size, total: float) -> str | None:
    """Why actor and engine cannot share a GPU of `total` bytes, or None."""
    share = config.rollout.gpu_memory_utilization
    rests = config.actor.offload_optimizer and config.rollout.sleep
    held, vllm = size.at_rest if rests else size.at_work, share * total
    total -= OWN_BYTES
    ways = f"{'actor.expert_parallel, ' if size.experts else ''}actor.tensor_parallel or actor.pipeline_parallel"
    if size.at_work > total:
        lora = "" if config.actor.lora_rank else ", or train LoRA (actor.lora_rank)"
        return (
            f"the actor needs {size.at_work / GIB:.0f} GiB of each GPU, which has room for {total / GIB:.0f}: use more "
            f"GPUs, with a larger {ways}{lora}"
        )
    if held + vllm > total:
        return (
            f"the actor's {held / GIB:.0f} GiB and vLLM's {vllm / GIB:.0f} (rollout.gpu_memory_utilization={share:g}) "
            f"do not fit on a GPU with room for {total / GIB:.0f}: set actor.offload_optimizer=true, lower "
            f"rollout.gpu_memory_utilization, or raise {ways}"
        )
    dialogue = size.token * config.rollout.max_model_len
    if config.rollout.quantization == "none" and size.engine + dialogue > vllm:
        return (
            f"vLLM's {vllm / GIB:.0f} GiB (rollout.gpu_memory_utilization={share:g}) hold no dialogue of "
            f"rollout.max_model_len={config.rollout.max_model_len} beside {size.engine / GIB:.0f} of weights: raise "
            "rollout.tensor_parallel or rollout.gpu_memory_utilization"
        )
    return None


def host_problem(config: Config, size: Size, node: Node) -> str | None:
    """Why a node's ranks cannot share its host memory, or None.

    A rank that saves holds a copy of all that it writes; one that loads, only a copy of one tensor at a time.
    """
    saved = node.ranks * size.saved
    offloaded = node.ranks * size.offloaded if config.actor.offload_optimizer else 0.0
    if saved + offloaded <= node.host:
        return None
    return (
        f"{node.name} has {node.host / GIB:.0f} GiB of host memory for this run, and its {node.ranks} ranks need "
        f"{saved / GIB:.0f} to save a checkpoint and {offloaded / GIB:.0f} for what is offloaded: ask for more "
        "(cluster.memory_gb), or use more nodes"
    )


def cpu_problem(config: Config, size: Size, node: Node) -> str | None:
    """Why a node's ranks cannot share its host memory without GPUs, or None.

    Activations and the KV cache come on top, and in a save's foreground copies of what are parts of larger tensors: the
    weights, and the state of the feed-forward layers' gate and up. What is offloaded stays in its buffers during an
    update, too.
    """
    actor = size.at_work + (size.optimizer if config.actor.offload_optimizer else 0.0)
    copy = size.saved if config.train.save_in_background else 0.0
    if node.ranks * (actor + size.engine + copy) <= node.host:
        return None
    less = "" if config.actor.lora_rank else "keep no reference (algo.kl_beta=0), train LoRA (actor.lora_rank), "
    copied = f" and {copy / GIB:.1f} for what train.save_in_background=true copies" if copy else ""
    return (
        f"{node.name} has {node.host / GIB:.1f} GiB of host memory for this run, and without a GPU each rank "
        f"({node.ranks} here) needs {actor / GIB:.1f} for the actor, {size.engine / GIB:.1f} for vLLM's weights"
        f"{copied}: share the model among more ranks (actor.tensor_parallel, rollout.tensor_parallel), "
        f"{less}or use a machine with more memory"
    )


def export_bytes(arch: Architecture) -> int:
    """What the comparison of an export takes of rank 0's host memory, which holds the model in fp32 for it."""
    return 4 * count_parameters(arch)


def export_problem(arch: Architecture, free: float) -> str | None:
    """Why a host with `free` bytes of memory cannot check an export, or None."""
    needed = export_bytes(arch)
    if needed <= free:
        return None
    return (
        f"{socket.gethostname()} has {free / GIB:.0f} GiB of host memory, and an export is checked by running the "
        f"model in fp32 on rank 0's CPU, which takes {needed / GIB:.0f}: export on a host with more, or ask for more "
        "(cluster.memory_gb)"
    )


def checkpoint_bytes(config: Config, arch: Architecture) -> float:
    """What a checkpoint takes on the disk."""
    if config.actor.lora_rank:
        return OPTIMIZER_BYTES * count_factors(arch, config.actor.lora_rank)
    return (OPTIMIZER_BYTES + precision_of(config).width) * count_parameters(arch)


def disk_problem(*runs: tuple[Config, Architecture, Path]) -> str | None:
    """Why the checkpoints of runs on one file system do not fit there, or None.

    Each run is its config, its model and the directory of its checkpoints, which need not exist.
    """
    to_come, kept, unfinished = Counter[float](), list[str](), 0
    for config, arch, checkpoints in runs:
        steps = steps_in(checkpoints)
        if steps and step_of(steps[0]) >= config.train.steps:
            continue  # there is nothing left to save
        to_come[checkpoint_bytes(config, arch)] += max(0, config.train.keep_checkpoints + 1 - len(steps))
        kept.append(str(config.train.keep_checkpoints))
        unfinished += sum(file.stat().st_size for file in (checkpoints / WRITING).glob("*"))  # the next save removes it
    shared = Path(os.path.commonpath([checkpoints.absolute() for _, _, checkpoints in runs]))
    place = next(path for path in (shared, *shared.parents) if path.exists())
    free = shutil.disk_usage(place).free + unfinished
    if sum(count * each for each, count in to_come.items()) <= free:
        return None
    return (
        f"run.dir: {place} has {in_words(free)} free for checkpoints, and "
        f"{' and '.join(f'{count} x {in_words(each)}' for each, count in to_come.items())} are still to come "
        f"(train.keep_checkpoints={' or '.join(dict.fromkeys(kept))}, and the one being written"
        f"{f', of each of {len(kept)} runs' if len(kept) > 1 else ''})"
    )


def host_bytes() -> float:
    """Host memory available to this process: the kernel's estimate, or its cgroup's limit if that is lower."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min([int(line.split()[1]) * 1024.0, *cgroup_limits(Path("/proc/self/cgroup").read_text())])
    return float("inf")


def cgroup_limits(membership: str) -> Iterator[float]:
    """Memory limits in bytes of a process's cgroups and their parents, from its /proc/<pid>/cgroup."""
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        group = root / path.lstrip("/")
        for directory in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            for name in LIMITS:
                file = directory / name
                if file.is_file() and (limit := file.read_text().strip()) != "max":
                    yield float(limit)
