"""What malloc does on a CPU with freed memory: it is kept for the next tensors, within limits."""

from __future__ import annotations

import ctypes

import torch

from nemo_r3.memory import resident

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 32 * 2**20
"""Freed blocks up to this size are kept: the most that glibc takes as a threshold."""
KEPT_IN_ALL = 2**30
"""So much of them may add up between updates. The embedded model keeps less, and would take a tenth longer without."""


def keep_freed_memory() -> None:
    """Makes malloc reuse freed memory: it would map and unmap tensors, and the kernel clears every new page.

    Larger blocks do go back, such as gradients and logits of a whole vocabulary. In the heap, smaller ones would settle
    in the holes that they leave, and with each update the heap would grow by as much again. Does nothing where CUDA is
    available.
    """
    if not torch.cuda.is_available():
        malloc = ctypes.CDLL(None)
        malloc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        malloc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Hands to the kernel what malloc keeps, after work that is rare; does nothing where CUDA is available."""
    if not torch.cuda.is_available():
        ctypes.CDLL(None).malloc_trim(0)


class FreedMemory:
    """What malloc keeps of what was freed since this object was made, or since it last went back."""

    def __init__(self) -> None:
        self._least = resident()

    def limit(self) -> None:
        """Gives freed memory back if this process has grown by more than `KEPT_IN_ALL`.

        Saves and long steps leave holes all over the heap. Left to malloc, each hole that an update finds too small
        stays resident, and a model of half a billion parameters grows by gigabytes.
        """
        if resident() - self._least > KEPT_IN_ALL:
            give_back_freed_memory()
            self._least = resident()
