"""What this rank holds: GPU memory by phase as torch and the driver count it, host memory as the kernel does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

GIB = 2**30
PIECE = 2 * GIB
"""Taken from the driver at a time. A tensor that stays in a piece keeps it from being given back."""


def restart_peak() -> int:
    """Resets torch's peak; returns the bytes allocated now. 0 on a CPU, whose allocator counts nothing."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def peak() -> int:
    """Most bytes of torch's allocator since `restart_peak`; 0 on a CPU."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0


def reserve(count: int) -> None:
    """Has torch's allocator take about `count` bytes from the driver at once; nothing on a CPU.

    After `empty_cache` each tensor would otherwise cost a cudaMalloc, for which the device waits. At least one piece
    of what is free is left to others.
    """
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        pieces = [
            torch.empty(PIECE, dtype=torch.uint8, device="cuda") for _ in range(min(count, free - PIECE) // PIECE)
        ]
        del pieces  # to the allocator, which cuts them up


def measured(phase: str) -> dict[str, float]:
    """GiB of this rank at the end of a phase, under the names of the metrics.

    `memory/<phase>_rss`: resident host memory. On CUDA also `_allocated`, `_reserved` and `_peak` of torch's allocator,
    and `_device`: all that is used of the GPU, NCCL, vLLM and others included.
    """
    found = {"rss": _resident()}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "peak": peak(),
            "device": total - free,
        }
    return {f"memory/{phase}_{name}": round(count / GIB, 4) for name, count in found.items()}


def _resident() -> int:
    """Bytes, from Linux's statm."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def show(count: float) -> str:
    """Bytes in a unit that suits them: "1.2 GiB" or "340.0 MiB"."""
    return f"{count / GIB:.1f} GiB" if count > GIB / 2 else f"{count / 2**20:.1f} MiB"


def table(holders: Mapping[str, int], phases: Mapping[str, float]) -> str:
    """Who holds what, if anything, and what each phase left, as lines for a log.

    Args:
        holders: bytes by holder.
        phases: metrics as `measured` names them; others are passed over.
    """
    lines = ["memory of rank 0: " + ", ".join(f"{name} {show(count)}" for name, count in holders.items() if count)]
    by_kind: dict[str, list[str]] = {}
    for name, amount in phases.items():
        if name.startswith("memory/"):
            phase, what = name.removeprefix("memory/").rsplit("_", 1)
            by_kind.setdefault(what, []).append(f"{phase} {show(amount * GIB)}")
    lines += [f"  {what} after {', '.join(parts)}" for what, parts in by_kind.items()]
    return "\n".join(lines)
