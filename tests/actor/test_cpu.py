"""What the actor spares a CPU: memory that stays, and copies that nobody needs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from nemo_r3.actor import cpu

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
after = _resident()
small = [torch.ones(2**21) for _ in range(8)]  # 8 MiB each
wall = torch.ones(2**18)
del small
kept = _resident()
cpu.give_back_freed_memory()
print(during - before, after - before, kept - before, _resident() - before)
"""


def test_large_tensors_go_back_to_the_kernel_when_they_are_freed() -> None:
    """In a heap that keeps them, smaller ones settle in their holes: 24 layers grew by 2 GB with every update."""
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=True)
    during, after, kept, given = map(int, found.stdout.split())
    assert during > 60 * 2**20 and after < 8 * 2**20
    assert kept > 60 * 2**20 and given < 8 * 2**20, "small ones stay, until they are asked for"


def test_a_rank_alone_sends_itself_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []

    def collective(into: Any, source: Any, group: int) -> None:
        groups.append(group)

    monkeypatch.setattr(cpu.dist, "get_world_size", lambda group: group)
    send, buffer = cpu._unless_alone(collective), torch.zeros(4)
    send(buffer, buffer, group=1)
    assert not groups
    send(buffer, buffer.clone(), group=1)
    send(buffer[:2], buffer, group=2)
    assert groups == [1, 2]
