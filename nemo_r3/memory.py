"""How much memory this rank uses: on the GPU as torch and the driver count it, on the host as the kernel does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from nemo_r3.units import GIB, in_words

PIECE = 2 * GIB
"""How much `reserve` takes from the driver at a time; a piece cannot be given back while a tensor is in it."""


def restart_peak() -> int:
    """Resets torch's peak; returns the bytes allocated now, or 0 on a CPU, whose allocator does not count."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def peak() -> int:
    """The most bytes that torch allocated since `restart_peak`; 0 on a CPU."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0


def reserve(count: int) -> None:
    """Makes torch's allocator take about `count` bytes from the driver in advance; does nothing on a CPU.

    After `empty_cache`, each tensor would otherwise cost a cudaMalloc, for which the device waits. At least one piece
    of the free memory is left to others.
    """
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        number = min(count, free - PIECE) // PIECE
        pieces = [torch.empty(PIECE, dtype=torch.uint8, device="cuda") for _ in range(number)]
        del pieces  # they stay with the allocator


def measured(phase: str) -> dict[str, float]:
    """GiB of this rank at the end of a phase, as metrics.

    `memory/<phase>_rss` is resident host memory. On CUDA, `_allocated`, `_reserved` and `_peak` are those of torch's
    allocator, and `_device` is all that is used of the GPU, including NCCL, vLLM and other processes.
    """
    amounts = {"rss": resident()}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        amounts |= {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "peak": peak(),
            "device": total - free,
        }
    return {f"memory/{phase}_{name}": round(count / GIB, 4) for name, count in amounts.items()}


def resident() -> int:
    """Resident bytes of this process, from Linux's statm."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def table(holders: Mapping[str, int], phases: Mapping[str, float]) -> str:
    """What holds how much memory, and how much there was after each phase, as lines for a log.

    Args:
        holders: bytes by holder.
        phases: metrics of `measured`; others are ignored.
    """
    lines = ["memory of rank 0: " + ", ".join(f"{name} {in_words(count)}" for name, count in holders.items() if count)]
    by_kind: dict[str, list[str]] = {}
    for name, amount in phases.items():
        if name.startswith("memory/"):
            phase, what = name.removeprefix("memory/").rsplit("_", 1)
            by_kind.setdefault(what, []).append(f"{phase} {in_words(amount * GIB)}")
    lines += [f"  {what} after {', '.join(parts)}" for what, parts in by_kind.items()]
    return "\n".join(lines)
