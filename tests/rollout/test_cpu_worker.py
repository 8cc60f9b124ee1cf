"""The names of the memory that CPU engines share; `test_engine.py` has an engine of two ranks."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Barrier, Event
from types import SimpleNamespace

import pytest

from nemo_r3 import rollout

FILE = Path(rollout.__file__).with_name("cpu_worker.py")


class SlowWorker:
    """In place of vLLM's: a rank of engine 0 is done while one of engine 1 has yet to open its memory."""

    home = Path()
    all_made, first_is_done = Barrier(2), Event()

    def __init__(self, engine: int) -> None:
        self.distributed_init_method, self._engine = "env://", engine
        self.opened = False

    def init_device(self) -> None:
        name = self.distributed_init_method.rpartition(":")[2]
        memory = self.home / f"{name}-tp:0-[{self._engine}]-cpushm_0"
        memory.touch()
        self.all_made.wait()
        if self._engine:
            self.first_is_done.wait(0.3)
        self.opened = memory.exists()


def test_no_engine_removes_the_memory_that_another_has_yet_to_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = SimpleNamespace(CPUWorker=SlowWorker)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.cpu_worker", worker)  # type: ignore[arg-type]
    spec = spec_from_file_location("cpu_worker", FILE)
    assert spec is not None and spec.loader is not None
    cpu_worker = module_from_spec(spec)  # no import: later tests shall find vLLM's worker beneath it
    spec.loader.exec_module(cpu_worker)
    all_opened = Barrier(2)

    def broadcast(box: list[str]) -> None:
        box[0] = "rank 0's"

    monkeypatch.setattr(cpu_worker, "dist", SimpleNamespace(broadcast_object_list=broadcast, barrier=all_opened.wait))
    monkeypatch.setattr(cpu_worker, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(SlowWorker, "home", tmp_path)
    workers = [cpu_worker.PrivateWorker(engine) for engine in range(2)]

    def start(worker: SlowWorker) -> None:
        worker.init_device()
        SlowWorker.first_is_done.set()

    with ThreadPoolExecutor(2) as ranks:
        list(ranks.map(start, workers))
    assert all(worker.opened for worker in workers) and not list(tmp_path.iterdir())
