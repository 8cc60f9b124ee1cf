"""What a reflection earns: the numbers that a group's advantages are made of."""

from __future__ import annotations

from nemo_r3.config import AlgoConfig
from nemo_r3.types import Reflection


def reward(reflection: Reflection, algo: AlgoConfig) -> float:
    """1 if the retry passes, otherwise 0.

    Without `algo.reward_leaks` it is 0, too, if the reflection itself passes, and so gives the answer away.
    """
    return float(reflection.passed and (algo.reward_leaks or not reflection.solves))
