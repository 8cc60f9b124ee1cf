"""What the actor spares a CPU: memory that stays, and copies that nobody needs."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from nemo_r3.actor import cpu

CODE = """
import torch
from nemo_r3.actor import heap
from nemo_r3.memory import resident

heap.keep_freed_memory()
before = resident()
large = torch.ones(2**24)  # 64 MiB, above KEPT_BYTES
wall = torch.ones(2**18)  # in a heap, what is freed below it could not be given back
during = resident()
del large
after = resident()
small = [torch.ones(2**21) for _ in range(8)]  # 8 MiB each
wall = torch.ones(2**18)
del small
kept = resident()
heap.give_back_freed_memory()
print(during - before, after - before, kept - before, resident() - before)
"""


def test_large_tensors_go_back_to_the_kernel_when_they_are_freed() -> None:
    """In a heap that keeps them, smaller ones settle in their holes: 24 layers grew by 2 GB with every update."""
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=True)
    during, after, kept, given = map(int, found.stdout.split())
    assert during > 60 * 2**20 and after < 8 * 2**20
    assert kept > 60 * 2**20 and given < 8 * 2**20, "small ones stay, until they are asked for"


LIMIT = """
import torch
from nemo_r3.actor import heap
from nemo_r3.memory import resident

heap.keep_freed_memory()
heap.KEPT_IN_ALL = 64 * 2**20
freed, before = heap.FreedMemory(), resident()

def kept_of(count):
    small, wall = [torch.ones(2**21) for _ in range(count)], torch.ones(2**18)  # 8 MiB each
    walls.append(wall)
    small.clear()
    freed.limit()
    return resident() - before

walls = []
print(kept_of(4), kept_of(16), kept_of(4))
"""


def test_what_is_freed_stays_up_to_a_limit() -> None:
    """A 0.5B kept 3 GiB of what saves and longer steps had once needed, in a heap of 7."""
    found = subprocess.run([sys.executable, "-c", LIMIT], capture_output=True, text=True, timeout=120, check=True)
    little, much, after = map(int, found.stdout.split())
    assert 24 * 2**20 < little < 64 * 2**20, "reusing it saves time"
    assert much < 16 * 2**20, "as much as that goes back"
    assert 24 * 2**20 < after < 64 * 2**20


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_and_weights_travel_within_their_buffer(ranks: int) -> None:
    """The other parts show that no copy was reduced: half a billion parameters' gradients take 2 GB."""
    store = dist.HashStore()

    def rank(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        group = dist.ProcessGroupGloo(store, number, ranks, timedelta(seconds=60))
        gradients, weights = torch.full((4,), 1.0 + number), torch.zeros(4)
        own = weights.chunk(ranks)[number].fill_(number + 1)
        cpu._reduce_within(gradients.chunk(ranks)[number], gradients, op=dist.ReduceOp.SUM, group=group, async_op=True)
        cpu._gather_within(weights, own, group=group, async_op=False)
        return gradients, weights

    with ThreadPoolExecutor(ranks) as pool:
        for reduced, gathered in pool.map(rank, range(ranks)):
            assert reduced.tolist() == [sum(range(1, ranks + 1))] * 4
            assert gathered.tolist() == [1 + place * ranks // 4 for place in range(4)]
