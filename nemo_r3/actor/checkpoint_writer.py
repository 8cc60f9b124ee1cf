"""Writes a checkpoint's shards in this process.

megatron-core's own writer starts a manager by importing the main module anew and forks one process per file. Here
vLLM's engine and its threads live in the same process, where importing twice takes long and forking can hang.
"""

from __future__ import annotations

import inspect
import queue
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy


class InProcessSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """megatron-core's torch_dist format, written file after file before `save` returns."""

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Writes this rank's files; every rank learns of any rank's failure.

        Raises:
            CheckpointException: a rank could not write.
        """
        filesystem_async._results_queue = queue.Queue()
        choosable = "async_strategy" in inspect.signature(self.async_save).parameters  # since megatron-core 0.19
        strategy = {"async_strategy": "mcore"} if choosable else {}
        request = self.async_save(sharded_state_dict, Path(checkpoint_dir), **strategy)
        if request.async_fn is not None:
            _, buckets, results = request.async_fn_args
            transforms = request.async_fn.args[0]
            results.put(_write(transforms, request.preload_fn() if request.preload_fn is not None else buckets))
        dist.barrier()
        for finish in request.finalize_fns:
            finish()


def _write(transforms: list[Any], buckets: list[Any]) -> dict[int, Any] | Exception:
    """Writes each bucket to its file; the results by bucket, or the first error."""
    written: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        pending: queue.Queue[int] = queue.Queue()
        pending.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, results, pending, use_fsync=True)
        _, outcome = results.get()
        if isinstance(outcome, Exception):
            return outcome
        written[number] = outcome
    return written
