"""What the actor asks of a CPU's memory."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import torch
from nemo_r3.actor import cpu
from nemo_r3.memory import _resident

cpu._keep_freed_memory()
before = _resident()
large = torch.ones(2**24)  # 64 MiB, above KEPT_BYTES
wall = torch.ones(2**18)  # in a heap, what is freed below it could not be given back
during = _resident()
del large
print(during - before, _resident() - before)
"""


def test_large_tensors_go_back_to_the_kernel_when_they_are_freed() -> None:
    """In a heap that keeps them, smaller ones settle in their holes: 24 layers grew by 2 GB with every update."""
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=True)
    during, after = map(int, found.stdout.split())
    assert during > 60 * 2**20 and after < 8 * 2**20
