"""`ThreadedSave`: writes a checkpoint's shards in threads of this process.

megatron-core's own writer starts a process that imports the main module again, and forks one process per file. With
vLLM's engine and its threads in the same process, importing twice is slow and forking can hang.
"""

from __future__ import annotations

import inspect
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from nemo_r3.files import sum_of

OPTIMIZER = "optimizer"
"""What the names of the optimizer's tensors, and of the files that hold nothing else, begin with."""
PATIENCE = 30.0
"""Seconds that a failed save waits for its threads: they end at once on a full disk, and never on one that hangs."""


class ThreadedSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """megatron-core's torch_dist format: `save` plans, threads write a file each, `finish` completes.

    Attributes:
        sums: SHA-256 of the files that this rank has written, by name; UNREADABLE if one could not be read back.
    """

    def __init__(self, copies: bool) -> None:
        """With `copies`, tensors may change between `save` and `finish`: the threads write copies of them."""
        super().__init__("torch_dist", 1, thread_count=4, separation_hint=OPTIMIZER)  # two files for each of the two
        self.sums: dict[str, str] = {}
        self._copies = copies
        self._files: list[Path] = []
        self._thread = Thread(target=self._write, daemon=True)
        self._work: tuple[list[Any], list[Any], queue.Queue[Any]] | None = None
        self._finish: list[Callable[[], None]] = []

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Plans the files with all ranks, and begins to write this rank's."""
        filesystem_async._results_queue = queue.Queue()
        choosable = "async_strategy" in inspect.signature(self.async_save).parameters  # since megatron-core 0.19
        strategy = {"async_strategy": "mcore"} if choosable else {}
        request = self.async_save(sharded_state_dict, Path(checkpoint_dir), **strategy)
        if request.async_fn is not None:
            _, buckets, results = request.async_fn_args
            # not in pinned memory, which torch would keep
            on_cpu = FileSystemWriterAsync.preload_tensors(buckets, False)
            self._files = [Path(bucket[0]) for bucket in buckets]
            self._work = request.async_fn.args[0], _copied(on_cpu, buckets) if self._copies else on_cpu, results
        self._finish = request.finalize_fns
        self._thread.start()

    def is_written(self) -> bool:
        """Whether `finish` would not have to wait for this rank's thread."""
        return not self._thread.is_alive()

    def bytes_written(self) -> int:
        """Size of this rank's files so far."""
        return sum(file.stat().st_size for file in self._files if file.exists())

    def finish(self) -> None:
        """Waits until every rank has written; every rank hears of any rank's failure.

        Raises:
            CheckpointException: a rank could not write.
        """
        self._thread.join()
        for finish in self._finish:
            finish()
        self._finish = []  # which hold what was written

    def abandon(self) -> None:
        """Waits, at most for PATIENCE, until this rank writes nothing more, so that what it wrote can be removed."""
        if self._thread.is_alive():
            self._thread.join(PATIENCE)

    def _write(self) -> None:
        if self._work is None:
            return
        transforms, buckets, results = self._work
        write = partial(self._write_file, transforms)
        try:
            with ThreadPoolExecutor(len(buckets)) as pool:
                results.put(dict(enumerate(pool.map(write, range(len(buckets)), buckets))))
        except Exception as error:  # noqa: BLE001  this is a thread: `finish` raises the error on every rank
            results.put(error)
        self._work = None  # frees the copies

    def _write_file(self, transforms: list[Any], number: int, bucket: Any) -> Any:
        """Writes and hashes a file; returns what megatron-core's writer returns for it."""
        results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        pending: queue.Queue[int] = queue.Queue()
        pending.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, results, pending, use_fsync=True)
        _, outcome = results.get()
        if isinstance(outcome, Exception):
            raise _origin(outcome)
        self.sums[Path(bucket[0]).name] = sum_of(Path(bucket[0]))
        return outcome


def _origin(error: Exception) -> Exception:
    """The file system's error behind one of torch's zip writer, which itself names only a position in the file."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error


def _copied(buckets: list[Any], sources: list[Any]) -> list[Any]:
    """Buckets whose tensors share no memory with the run's; what came from a GPU is a copy already."""
    copies = []
    for (*names, (texts, tensors)), (*_, (_, originals)) in zip(buckets, sources, strict=True):
        pairs = zip(tensors, originals, strict=True)
        own = [(item, tensor.clone() if source.is_cpu else tensor) for (item, tensor), (_, source) in pairs]
        copies.append((*names, (texts, own)))
    return copies
