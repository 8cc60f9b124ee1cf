"""vLLM's worker on a CPU, for an engine of several ranks: what they share is this engine's alone."""

from __future__ import annotations

import uuid
from pathlib import Path

import torch.distributed as dist
from vllm.v1.worker.cpu_worker import CPUWorker

SHARED_MEMORY = Path("/dev/shm")


class PrivateWorker(CPUWorker):
    """Names the ranks' shared memory after this run, and removes the name as soon as all have opened it.

    vLLM names it after nothing but the ranks, so runs on one host would open or remove each other's. Memory without a
    name is freed with the last process that has it, however that ends.
    """

    def init_device(self) -> None:
        """Connects the ranks, all of which call this."""
        name = [uuid.uuid4().hex]
        dist.broadcast_object_list(name)
        self.distributed_init_method += f":{name[0]}"  # vLLM names the memory after what follows the last colon
        super().init_device()
        dist.barrier()  # the name is that of all engines, and another's ranks may not have opened theirs yet
        for file in SHARED_MEMORY.glob(f"*{name[0]}*"):
            file.unlink(missing_ok=True)
