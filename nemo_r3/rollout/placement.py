"""`Fleet`: deals work to the engines, statically, and lets the ranks of one stop together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from nemo_r3 import signals
from nemo_r3.algo import balance
from nemo_r3.runtime import World

STEPS_BETWEEN_VOTES = 16
"""Every so many engine steps, a few hundred milliseconds, the ranks of an engine ask each other whether to stop."""


class Fleet:
    """The engines of a run; each is made of `tensor_parallel` consecutive ranks.

    Attributes:
        world: all ranks.
        tensor_parallel: ranks per engine.
    """

    def __init__(self, world: World, tensor_parallel: int) -> None:
        """All ranks call this together.

        A group that its own ranks alone make would be named after how many they are in: in a pipeline that differs.
        """
        self.world, self.tensor_parallel = world, tensor_parallel
        self._steps = 0
        if tensor_parallel > 1:
            self._group, _ = dist.new_subgroups(tensor_parallel, dist.group.WORLD, world.timeout, "gloo")

    def deal(self, costs: Sequence[int], samples: int) -> tuple[list[int], frozenset[int]]:
        """Deals items to the engines by their costs; item i has `samples` results, numbered from i * samples.

        Returns:
            The numbers of this rank's engine, ascending; and of these, those of the results that this rank judges and
            gives to the others: neighbours, which share a context.
        """
        ranks = self.tensor_parallel
        engine, place = divmod(self.world.rank, ranks)
        own = sorted(balance.deal(costs, self.world.size // ranks)[engine])
        numbers = [item * samples + sample for item in own for sample in range(samples)]
        return numbers, frozenset(numbers[len(numbers) * place // ranks : len(numbers) * (place + 1) // ranks])

    def asked_to_stop(self, failed: bool) -> bool:
        """Whether this rank's engine should stop; its ranks call this before each step, and all hear the same.

        Args:
            failed: whether this rank has a reason of its own.
        """
        stop = failed or signals.noted() is not None
        if self.tensor_parallel == 1:
            return stop
        self._steps += 1
        if self._steps % STEPS_BETWEEN_VOTES:
            return False
        asked = torch.tensor(stop, dtype=torch.int32)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        return bool(asked)
