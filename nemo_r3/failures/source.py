"""`Source`: gives each training step its failures, from a bank or from the current policy."""

from __future__ import annotations

import random
from collections.abc import Sequence, Set
from functools import lru_cache
from typing import Protocol

from nemo_r3.errors import UserError
from nemo_r3.failures.bank import BankRow
from nemo_r3.rollout.scheduler import Rollout
from nemo_r3.runtime import World
from nemo_r3.types import Attempt, Problem

ONLINE_ROUNDS = 50
"""How many batches of problems `OnlineSource` tries before it concludes that the policy solves them all."""


class Source(Protocol):
    """Gives each training step its failures."""

    cursor: int  # how far it has come; checkpoints keep it

    def draw(self, step: int) -> list[Attempt]:
        """The failures of a step, the same on every rank."""
        ...


class BankSource:
    """Goes through a bank in a new seeded order each epoch; an incomplete batch at an epoch's end is dropped."""

    def __init__(self, rows: Sequence[BankRow], count: int, seed: int, world: World) -> None:
        """Gives `count` failures per step.

        Raises:
            UserError: the bank is smaller than a step.
        """
        if len(rows) < count:
            raise UserError(
                f"failures.path: the bank holds {len(rows)} failures, fewer than train.failures_per_step={count}; "
                "mine more problems or samples, or lower it"
            )
        self.cursor = 0
        self._rows, self._count, self._seed, self._world = rows, count, seed, world

    def draw(self, step: int) -> list[Attempt]:
        """The next `count` failures, as rank 0 reads them; `step` has no effect."""
        epoch, place = divmod(self.cursor, len(self._rows) // self._count)
        order = epoch_order(len(self._rows), self._seed, epoch)
        self.cursor += 1
        drawn = order[place * self._count : (place + 1) * self._count]
        return self._world.on_main(lambda: [self._rows[i].load() for i in drawn])


class OnlineSource:
    """Draws first attempts from the current policy and keeps those it fails."""

    def __init__(self, rollout: Rollout, problems: Sequence[Problem], count: int, seed: int) -> None:
        """Gives `count` failures per step, from as many problems as that takes.

        Raises:
            UserError: there is no problem to ask.
        """
        if not problems:
            raise UserError("failures.source=online: the task has no training problems; lower task.options.test_size")
        self.cursor = 0
        self._rollout, self._problems, self._count, self._seed = rollout, problems, count, seed

    def draw(self, step: int) -> list[Attempt]:
        """Asks batches of problems, none of them twice, until `count` answers are rejected.

        Raises:
            UserError: too few are, in many batches or all problems.
        """
        failures: list[Attempt] = []
        asked: set[int] = set()
        for _ in range(ONLINE_ROUNDS):
            if not (batch := self._next_unasked(asked)):
                break
            asked.update(batch)
            attempts = self._rollout.first_attempts([self._problems[i] for i in batch], step)
            failures += [attempt for attempt in attempts if attempt.is_failure]
            if len(failures) >= self._count:
                return failures[: self._count]
        too_long = self._rollout.too_long & {self._problems[i].id for i in asked}  # others may be held out
        raise UserError(
            f"failures.source=online: {len(asked)} first answers gave {len(failures)} failures, "
            f"fewer than train.failures_per_step={self._count}; the policy solves this task already, or its "
            f"problems do not fit rollout.max_model_len ({len(too_long)} of them)"
        )

    def _next_unasked(self, asked: Set[int]) -> list[int]:
        """The indices of the next `count` problems that were not asked, or fewer if fewer are left."""
        chosen: list[int] = []
        while len(chosen) < min(self._count, len(self._problems) - len(asked)):
            epoch, place = divmod(self.cursor, len(self._problems))
            problem = epoch_order(len(self._problems), self._seed, epoch)[place]
            self.cursor += 1
            if problem not in asked and problem not in chosen:
                chosen.append(problem)
        return chosen


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The seeded order in which an epoch visits `count` items."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)
