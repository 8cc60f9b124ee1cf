from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from nemo_r3 import memory


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_resident_memory_grows_by_what_is_held() -> None:
    before = memory.measured("update")["memory/update_rss"]
    held = torch.ones(2**28, dtype=torch.uint8)
    after = memory.measured("update")["memory/update_rss"]
    del held
    assert after - before == pytest.approx(0.25, abs=0.03)


def test_the_table_names_holders_and_phases() -> None:
    holders = {"weights": 3 * 2**30, "optimizer state on the host": 0, "KV cache": 2**27}
    text = memory.table(
        holders, {"memory/mine_rss": 1.25, "memory/refit_rss": 2.5, "memory/refit_peak": 0.25, "time/refit": 1.0}
    )
    assert text.splitlines() == [
        "memory of rank 0: weights 3.0 GiB, KV cache 128.0 MiB",
        "  rss after mine 1.2 GiB, refit 2.5 GiB",
        "  peak after refit 256.0 MiB",
    ]


@pytest.mark.gpu
def test_peak_and_device_are_counted_on_a_gpu() -> None:
    resting = memory.restart_peak()
    held = torch.ones(2**28, dtype=torch.uint8, device="cuda")
    found = memory.measured("update")
    assert memory.peak() - resting >= held.nbytes
    assert found["memory/update_device"] >= found["memory/update_reserved"] >= found["memory/update_allocated"] >= 0.25


@pytest.mark.gpu
def test_what_is_reserved_is_cut_up_and_given_back() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    memory.reserve(2 * memory.PIECE + 1)
    assert torch.cuda.memory_reserved() == before + 2 * memory.PIECE
    parts = [torch.empty(memory.PIECE // 4, dtype=torch.uint8, device="cuda") for _ in range(8)]
    assert torch.cuda.memory_reserved() == before + 2 * memory.PIECE
    del parts
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to reserve on")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_on_a_cpu_nothing_is_reserved() -> None:
    """There is no room for a piece, so asking for one would raise."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory.PIECE // 2, hard))
    try:
        memory.reserve(memory.PIECE)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
