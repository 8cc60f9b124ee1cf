"""The ranks of a run: how they meet, their devices and their seeds."""

from __future__ import annotations

import atexit
import os
import random
import resource
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist

from nemo_r3 import signals, watchdog
from nemo_r3.config import Config, check_world
from nemo_r3.errors import ConfigError, UserError, in_one_line

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


Item = TypeVar("Item")
Key = TypeVar("Key")
Result = TypeVar("Result")
ROUTES = Path("/proc/net/route")

# megatron-core orders its overlaps by it; the driver reads it when CUDA starts, for which it is enough to ask for GPUs
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


@dataclass(frozen=True)
class World:
    """All ranks of the run, and this one."""

    rank: int  # this process, from 0
    size: int  # number of processes
    device: torch.device  # where the actor's tensors live
    objects: ProcessGroup  # gloo group of all ranks, for Python objects
    timeout: timedelta  # how long a collective may wait

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    @property
    def gpu_name(self) -> str:
        """The GPU's name, as CUDA has it; empty on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""

    @property
    def gpu_bytes(self) -> int:
        """The GPU's memory; 0 on a CPU."""
        return torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else 0

    def gather(self, item: Item) -> list[Item]:
        """Every rank's `item`, in rank order, on every rank."""
        watchdog.alive()
        items = [item] * self.size
        dist.all_gather_object(items, item, group=self.objects)
        return items

    def merge(self, part: Mapping[Key, Result]) -> dict[Key, Result]:
        """Every rank's entries in one, on every rank."""
        return {key: value for each in self.gather(dict(part)) for key, value in each.items()}

    def merge_on_main(self, part: Mapping[Key, Result]) -> dict[Key, Result]:
        """Every rank's entries in one, on rank 0; none elsewhere. For what is too large for every rank of a host."""
        watchdog.alive()
        parts = [dict(part)] * self.size if self.is_main else None
        dist.gather_object(dict(part), parts, dst=0, group=self.objects)
        return {key: value for each in parts or () for key, value in each.items()}

    def broadcast(self, item: Item) -> Item:
        """Rank 0's `item`, on every rank."""
        watchdog.alive()
        box = [item]
        dist.broadcast_object_list(box, src=0, group=self.objects)
        return box[0]

    def on_main(self, act: Callable[[], Result]) -> Result:
        """Calls `act` on rank 0; returns its result on every rank.

        Raises:
            UserError: `act` raised it; every rank does.
        """
        outcome: Any = None
        if self.is_main:
            try:
                outcome = act()
            except UserError as error:
                outcome = error
        outcome = self.broadcast(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        return cast(Result, outcome)

    def barrier(self) -> None:
        """Waits for every rank."""
        watchdog.alive()
        dist.barrier(group=self.objects)

    def leave_if_asked(self) -> None:
        """Stops all ranks if a signal asked any of them to; every rank calls this.

        Raises:
            Stopped: on every rank.
        """
        if asked := [name for name in self.gather(signals.noted()) if name is not None]:
            raise signals.Stopped(f"stopped by {asked[0]}")


def start(config: Config) -> World:
    """Joins the process group that torchrun or srun describes; without either, makes one of a single rank.

    Raises:
        ConfigError: the layout does not fit the launched ranks, or a variable that describes them is wrong or missing.
        UserError: this node's GPUs cannot be used, or only some nodes have any.
    """
    _read_srun()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    rank, size, local = map(_number_in, ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    check_world(config, size)
    _check_meeting(rank, size)
    on_cuda = _has_cuda(local)
    device = torch.device("cuda", local) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=config.run.timeout_minutes)
    signals.listen()
    watchdog.watch(timeout.total_seconds())
    _allow_open_files()
    _name_interface(size)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    store = None
    if size == 1 and "MASTER_PORT" not in os.environ:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], 0, 1, is_master=True, timeout=timeout)  # finds a free port
        os.environ["MASTER_PORT"] = str(store.port)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    objects = dist.new_group(backend="gloo", timeout=timeout)
    assert objects is not None
    atexit.register(_end_groups)
    world = World(rank, size, device, objects, timeout)
    _refuse_mixed_devices(world)
    return world


def _end_groups() -> None:
    """Ends gloo's threads: one that frees a tensor while Python shuts down would abort the process.

    With an engine, vLLM's own exit hook destroys the groups, and it fails if they are gone.
    """
    if dist.is_initialized() and "vllm" not in sys.modules:
        dist.destroy_process_group()


def _number_in(name: str, default: int = 0) -> int:
    """A whole number from 0 in an environment variable.

    Raises:
        ConfigError: it holds something else.
    """
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(f"the environment's {name}={in_one_line(repr(value))} is not a whole number from 0")
    return int(value)


def _check_meeting(rank: int, size: int) -> None:
    """Checks where the ranks meet; one alone needs no port, and meets itself here.

    Raises:
        ConfigError: several ranks were started, but nothing says where they meet, or this is not one of them.
    """
    if rank >= size:
        raise ConfigError(f"the environment's RANK={rank} is not below WORLD_SIZE={size}")
    if size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    elif missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise ConfigError(
            f"{size} ranks were started, and the environment has no {' and no '.join(missing)}: export MASTER_ADDR "
            "(the first host) and MASTER_PORT for them"
        )
    if (port := _number_in("MASTER_PORT")) >= 2**16:
        raise ConfigError(f"the environment's MASTER_PORT={port} is not a port, which is below {2**16}")
    host = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:  # torch would try for run.timeout_minutes, and no signal would end it
        raise ConfigError(
            f"the environment's MASTER_ADDR={in_one_line(repr(host))} is no host that {socket.gethostname()} knows "
            f"({error.strerror})"
        ) from error


def _read_srun() -> None:
    """Takes the ranks from srun if srun started this process, and not torchrun."""
    if "RANK" in os.environ or "SLURM_STEP_ID" not in os.environ or "SLURM_PROCID" not in os.environ:
        return
    for name, slurm in (("RANK", "PROCID"), ("WORLD_SIZE", "NTASKS"), ("LOCAL_RANK", "LOCALID")):
        os.environ[name] = os.environ[f"SLURM_{slurm}"]


def _has_cuda(local: int) -> bool:
    """Whether this rank runs on a GPU.

    Raises:
        UserError: the node has GPUs, but CUDA does not start on them, or this rank does not see its own.
    """
    host, count = socket.gethostname(), torch.cuda.device_count()  # the driver's count, even if CUDA does not start
    if not torch.cuda.is_available():
        if count:
            raise UserError(
                f"{host} has {count} GPUs, but CUDA does not start on them: an old driver, or no fabric manager? "
                "To run on the CPU, set CUDA_VISIBLE_DEVICES to nothing"
            )
        return False
    if local >= count:
        raise UserError(
            f"local rank {local} on {host} sees {count} GPUs: every rank must see all GPUs of its node, and takes the "
            "one of its local rank. Leave out --gpu-bind, --gpus-per-task and a CUDA_VISIBLE_DEVICES of each task's own"
        )
    return True


def _allow_open_files() -> None:
    """Raises this process's limit of open files as far as it may go.

    A gloo group has a socket to each of its other ranks. Data parallelism alone makes ten groups of all ranks, so 90
    ranks would exceed 1,024, which is a common limit.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _refuse_mixed_devices(world: World) -> None:
    devices = world.gather((socket.gethostname(), world.device.type))
    if len({kind for _, kind in devices}) > 1:
        without = sorted({host for host, kind in devices if kind == "cpu"})
        raise UserError(f"CUDA finds no GPU on {', '.join(without)}, but finds some on the other nodes")


def _name_interface(size: int) -> None:
    """Makes gloo use the default route's interface, if there are several nodes and this host's name means loopback.

    Debian's /etc/hosts says "127.0.1.1 <host name>", and gloo would tell the other nodes to connect to that.

    Raises:
        ConfigError: a variable that says how many nodes there are is no number.
    """
    several_nodes = size > _number_in("LOCAL_WORLD_SIZE", size) or _number_in("SLURM_STEP_NUM_NODES", 1) > 1
    if not several_nodes or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:  # without an address for the name, gloo takes the loopback, too
        address = "127.0.0.1"
    interface = default_interface(ROUTES.read_text()) if address.startswith("127.") and ROUTES.exists() else None
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def default_interface(routes: str) -> str | None:
    """The default route's network interface, from the text of /proc/net/route; None if there is no default route."""
    rows = [line.split() for line in routes.splitlines()[1:]]
    defaults = [(int(row[6]), row[0]) for row in rows if len(row) > 7 and row[1] == row[7] == "00000000"]
    return min(defaults)[1] if defaults else None


def seed_generators(seed: int, step: int) -> None:
    """Seeds every generator from (seed, step) alone, so that a repeated step draws the same numbers."""
    mixed = step_seed(seed, step) % 2**31
    random.seed(mixed)
    torch.manual_seed(mixed)


def step_seed(seed: int, step: int) -> int:
    """One number for the run's seed and a step."""
    return seed * 1_000_003 + step


def is_collective(error: BaseException) -> bool:
    """Whether a collective failed. gloo raises a bare RuntimeError, recognised by the path in its message."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
