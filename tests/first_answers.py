"""First answers that are scripted, and the failure banks mined from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from nemo_r3.config import Config
from nemo_r3.failures.bank import Bank
from nemo_r3.failures.stamp import Stamp
from nemo_r3.files import _locks
from nemo_r3.runtime import World
from nemo_r3.types import Answer, Attempt, Phase, Problem, Segment, Trajectory

SHARD = 4
"""Problems of a shard, once `failures.SHARD_PROBLEMS` is patched; `bank`'s engine is then given one shard at once."""
STAMP = Stamp("m0", "p0", "countdown", "v1", "d0", 1.0, 24, 2)
ALONE = cast(
    World,
    SimpleNamespace(is_main=True, size=1, broadcast=lambda item: item, on_main=lambda act: act(), barrier=lambda: None),
)


class Scripted:
    """The first `passes` of the answers to each problem are right."""

    def __init__(self, passes: int = 1) -> None:
        self.passes = passes
        self.asked = 0  # problems
        self.steps = set[int]()  # training steps that they were asked in
        self.too_long = set[str]()

    def first_attempts(
        self, problems: Sequence[Problem], step: int, samples: int = 1, everywhere: bool = True
    ) -> list[Attempt]:
        self.asked += len(problems)
        self.steps.add(step)
        return [attempt(problem, sample, sample < self.passes) for problem in problems for sample in range(samples)]


def attempt(problem: Problem, sample: int, passed: bool) -> Attempt:
    segment = Segment(Phase.ATTEMPT, (7, 8, 2), (-0.5, -0.25, -0.125), 0)
    context = Trajectory((Segment(Phase.TASK, (1, 5)), segment))
    return Attempt(problem, sample, context, Answer(segment, "7 8", "stop"), passed)


def problems(count: int) -> list[Problem]:
    return [Problem(f"p{i}", f"problem {i}", {"numbers": [i], "target": i}) for i in range(count)]


def numbers(ids: Sequence[int]) -> str:
    return " ".join(str(i) for i in ids[:-1])


def bank(
    path: Path,
    stamp: Stamp = STAMP,
    world: World = ALONE,
    decode: Callable[[Sequence[int]], str] = numbers,
    **settings: object,
) -> Bank:
    config = Config()
    config.failures.path = str(path)
    config.failures.samples_per_problem, config.rollout.max_num_seqs = 2, 2
    for name, value in settings.items():
        setattr(config.failures, name, value)
    return Bank(config, stamp, world, decode)


def read(bank: Bank) -> list[Attempt]:
    return [row.load() for row in bank.read()]


def mine(path: Path, rollout: Scripted, asked: Sequence[Problem]) -> None:
    """As a process does that ends afterwards."""
    bank(path).mine(rollout, asked)
    _locks.pop().close()
