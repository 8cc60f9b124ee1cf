"""Group advantages (GRPO, arXiv 2402.03300, section 4.1.2) and the shuffled-reward control."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

STD_EPSILON = 1e-4  # TRL's, which the paper trained with


def group_advantages(rewards: Sequence[float], normalise: bool) -> list[float]:
    """Rewards [G] -> advantages [G]: centred, and divided by the group's standard deviation if `normalise`.

    The standard deviation is the sample one (G - 1), as in TRL.
    """
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards) + STD_EPSILON if normalise else 1.0
    return [(reward - mean) / scale for reward in rewards]


def is_mixed(rewards: Sequence[float]) -> bool:
    """Whether a group can teach anything: its rewards are not all the same."""
    return min(rewards) != max(rewards)


def shuffled(rewards: Sequence[Sequence[float]], seed: int) -> list[list[float]]:
    """The same rewards dealt at random over all groups' reflections: a control that must not learn."""
    flat = [reward for group in rewards for reward in group]
    random.Random(seed).shuffle(flat)
    supply = iter(flat)
    return [[next(supply) for _ in group] for group in rewards]
