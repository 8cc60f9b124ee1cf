"""Group advantages, and shuffled rewards as a control."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from enum import StrEnum

STD_EPSILON = 1e-4  # TRL's, which the paper trained with


class Advantage(StrEnum):
    """What a group's rewards are measured against."""

    STD = "std"  # centred, divided by the standard deviation (GRPO, arXiv 2402.03300, section 4.1.2)
    CENTRED = "centred"  # minus the group's mean (Dr. GRPO, arXiv 2503.20783)
    LEAVE_ONE_OUT = "leave_one_out"  # minus the mean of the others (RLOO, arXiv 2402.14740)


def group_advantages(rewards: Sequence[float], kind: Advantage) -> list[float]:
    """Rewards [G] -> advantages [G], G at least 2.

    The standard deviation is the sample one (G - 1), as in TRL.
    """
    mean = statistics.fmean(rewards)
    if kind == Advantage.STD:
        scale = statistics.stdev(rewards) + STD_EPSILON
        return [(reward - mean) / scale for reward in rewards]
    if kind == Advantage.CENTRED:
        return [reward - mean for reward in rewards]
    others = len(rewards) - 1
    return [reward - (sum(rewards) - reward) / others for reward in rewards]


def is_mixed(rewards: Sequence[float]) -> bool:
    """Whether a group can teach anything: its rewards are not all equal."""
    return min(rewards) != max(rewards)


def shuffled(rewards: Sequence[Sequence[float]], seed: int) -> list[list[float]]:
    """Each group's rewards in random order: a control that must not learn, with just as many mixed groups."""
    draw = random.Random(seed)
    return [draw.sample(group, len(group)) for group in rewards]
