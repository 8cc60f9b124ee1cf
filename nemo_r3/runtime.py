"""The process under a recipe: ranks, device, seeds, and errors that end it in one line."""

from __future__ import annotations

import atexit
import errno
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from nemo_r3 import signals
from nemo_r3.config import Config, check_world
from nemo_r3.config.load import USAGE
from nemo_r3.errors import ConfigError, UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


Result = TypeVar("Result")
ROUTES = Path("/proc/net/route")
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
)
"""What a user can fix, met in a file or directory."""


@dataclass(frozen=True)
class World:
    """All ranks of the run, and this one.

    Attributes:
        rank: this process, from 0.
        size: number of processes.
        device: where the actor's tensors live.
        objects: gloo group of all ranks, for Python objects.
        timeout: how long a collective may wait.
    """

    rank: int
    size: int
    device: torch.device
    objects: ProcessGroup
    timeout: timedelta

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    @property
    def gpu_name(self) -> str:
        """The GPU's name, as CUDA has it; empty on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""

    def gather(self, item: Any) -> list[Any]:
        """Every rank's `item`, in rank order, on every rank."""
        signals.alive()
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.objects)
        return items

    def broadcast(self, item: Any) -> Any:
        """Rank 0's `item`, on every rank."""
        signals.alive()
        box = [item]
        dist.broadcast_object_list(box, src=0, group=self.objects)
        return box[0]

    def on_main(self, act: Callable[[], Result]) -> Result:
        """What `act` returns on rank 0, on every rank.

        Raises:
            UserError: `act` raised it on rank 0; on every rank alike.
        """
        found: Any = None
        if self.is_main:
            try:
                found = act()
            except UserError as error:
                found = error
        found = self.broadcast(found)
        if isinstance(found, UserError):
            raise found
        returned: Result = found
        return returned

    def barrier(self) -> None:
        """Waits for every rank."""
        signals.alive()
        dist.barrier(group=self.objects)

    def leave_if_asked(self) -> None:
        """Every rank calls this.

        Raises:
            Stopped: a signal asked any of them to stop.
        """
        if asked := [name for name in self.gather(signals.noted()) if name is not None]:
            raise signals.Stopped(f"stopped by {asked[0]}")


def start(config: Config) -> World:
    """Joins the process group that torchrun or srun describes, or makes one of a single rank.

    Raises:
        ConfigError: the ranks that were launched do not fit the layout.
        UserError: this node's GPUs cannot be used, or only some nodes have any.
    """
    _read_srun()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost")):
        os.environ.setdefault(name, value)
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    check_world(config, size)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # megatron-core orders its overlaps by it
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    on_cuda = _has_cuda(local)
    device = torch.device("cuda", local) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=config.run.timeout_minutes)
    signals.listen()
    signals.watch(timeout.total_seconds())
    _name_interface(size)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    objects = dist.new_group(backend="gloo", timeout=timeout)
    assert objects is not None
    atexit.register(_end_groups)
    world = World(rank, size, device, objects, timeout)
    _refuse_mixed_devices(world)
    return world


def _end_groups() -> None:
    """Ends gloo's threads: one that lets go of a tensor while Python shuts down aborts the process.

    Where there is an engine, vLLM's own exit hook destroys the groups, and fails if they are gone.
    """
    if dist.is_initialized() and "vllm" not in sys.modules:
        dist.destroy_process_group()


def _read_srun() -> None:
    """Takes the ranks from srun where it started this process, and torchrun did not.

    Raises:
        ConfigError: srun started several ranks, and nothing says where they meet.
    """
    if "RANK" in os.environ or "SLURM_STEP_ID" not in os.environ or "SLURM_PROCID" not in os.environ:
        return
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ConfigError("srun started several ranks: export MASTER_ADDR (the first host) and MASTER_PORT for them")
    for name, slurm in (("RANK", "PROCID"), ("WORLD_SIZE", "NTASKS"), ("LOCAL_RANK", "LOCALID")):
        os.environ[name] = os.environ[f"SLURM_{slurm}"]


def _has_cuda(local: int) -> bool:
    """Whether this rank runs on a GPU.

    Raises:
        UserError: the node has GPUs, but CUDA does not start on them, or this rank does not see its own.
    """
    host, count = socket.gethostname(), torch.cuda.device_count()  # of the driver: CUDA itself need not work
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


def _refuse_mixed_devices(world: World) -> None:
    found = world.gather((socket.gethostname(), world.device.type))
    without = sorted({host for host, kind in found if kind == "cpu"})
    if len({kind for _, kind in found}) > 1:
        raise UserError(f"CUDA finds no GPU on {', '.join(without)}, but finds some on the other nodes")


def _name_interface(size: int) -> None:
    """Between nodes, has gloo use the default route's interface if this host's own name leads to its loopback.

    Debian's /etc/hosts says "127.0.1.1 <host name>", and gloo would tell the other nodes to connect to that.
    """
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    several_nodes = size > local_size or int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) > 1
    if not several_nodes or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:  # a name that leads nowhere: gloo takes the loopback then, too
        address = "127.0.0.1"
    interface = default_interface(ROUTES.read_text()) if address.startswith("127.") and ROUTES.exists() else None
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def default_interface(routes: str) -> str | None:
    """The default route's network interface in the text of /proc/net/route, or None where there is no such route."""
    rows = [line.split() for line in routes.splitlines()[1:]]
    defaults = [(int(row[6]), row[0]) for row in rows if len(row) > 7 and row[1] == row[7] == "00000000"]
    return min(defaults)[1] if defaults else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def seed_generators(seed: int, step: int) -> None:
    """Seeds every generator from (seed, step) alone, so that a resumed step draws what the first run drew."""
    mixed = step_seed(seed, step) % 2**31
    random.seed(mixed)
    torch.manual_seed(mixed)


def step_seed(seed: int, step: int) -> int:
    """One number for the run's seed and a step."""
    return seed * 1_000_003 + step


def main(recipe: Callable[[Sequence[str]], None]) -> None:
    """Runs a recipe on the command line's arguments; a `UserError` becomes one line and exit code 2, a stop code 75.

    Every failure leaves through os._exit: interpreter shutdown would run vLLM's exit hooks, which wait for ranks that
    are themselves waiting in a collective.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by `recipes` until here
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if sys.argv[1:2] in (["--help"], ["-h"]):
            print(f"{sys.modules[recipe.__module__].__doc__}\n{USAGE}")
        else:
            recipe(sys.argv[1:])
    except UserError as error:
        _leave(f"error: {error}", 2)
    except signals.Stopped as error:
        _leave(f"{error}: the same command goes on from what is saved", signals.STOPPED)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except Exception as error:  # noqa: BLE001  the last frame of the process: print what it was, end the rank
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            where = error.filename or "writing failed"
            _leave(f"error: {where}: {error.strerror}; fix that and run the same command again", 2)
        if is_collective(error):
            _leave(f"error: {_of_another_rank(error)}", 1, follows=True)
        _leave(traceback.format_exc(), 1)
    sys.stdout.flush()


def is_collective(error: BaseException) -> bool:
    """Whether a collective failed. gloo raises a bare RuntimeError, so its name in the message has to do."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _of_another_rank(error: Exception) -> str:
    """The message for a failed collective: the cause is in another rank's log, and in no stack of this one."""
    said = str(error).partition("\n")[0]
    if "connectFullMesh" in said:
        return (
            "the ranks cannot connect to each other: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network "
            f"interface that the nodes share, under Slurm in cluster.setup ({said})"
        )
    if "timed out" in said.lower() or "timeout" in said.lower():
        return (
            f"a collective waited for another rank until run.timeout_minutes; the stacks of all ranks say why ({said})"
        )
    return f"another rank has ended, which ends this one; that one's message says why ({said})"


def _leave(message: str, code: int, follows: bool = False) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if follows or (rank and code != signals.STOPPED):
        signals.restore_defaults()
        time.sleep(3)  # rank 0 prints an error that all ranks meet; a rank's own error comes before those that follow
    if rank:
        message = f"[rank {rank}] {message}"
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(code)
