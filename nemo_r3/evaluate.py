"""What training changed, on held-out problems: first try, second try given a failure, and either of them.

Retry success is measured on the starting model's own failures, the same ones before and after: on the model's own
current failures it would sink as the model improves, since only hard problems stay failures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemo_r3.rollout.scheduler import Attempted, Rollout
from nemo_r3.types import Failure, Problem

EVALUATION_STEP = -1
"""The step in the seeds of evaluation requests: no training step has it, so evaluating changes no run."""
Z95 = 1.959964


@dataclass(frozen=True)
class Rate:
    """A success rate with its 95 % Wilson interval.

    Attributes:
        value: share of successes.
        low: lower end of the interval.
        high: upper end of the interval.
        n: distinct problems.
    """

    value: float
    low: float
    high: float
    n: int


Scores = dict[str, dict[str, Rate]]
"""first_try | retry_success_fixed | within_two -> sampled | greedy -> Rate."""


def rate(passed: int, n: int) -> Rate:
    """The success rate of `passed` out of `n` with its Wilson score interval (Wilson 1927)."""
    if n == 0:
        return Rate(math.nan, 0.0, 1.0, 0)
    share, z2 = passed / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Rate(round(share, 4), round(max(0.0, centre - half), 4), round(min(1.0, centre + half), 4), n)


def failures_of(attempts: Sequence[Attempted]) -> list[Failure]:
    """The rejected attempts that have tokens to reflect on."""
    return [attempt.failure for attempt in attempts if attempt.is_failure]


def measure(
    rollout: Rollout, problems: Sequence[Problem], fixed: Sequence[Failure] | None = None
) -> tuple[Scores, list[Failure]]:
    """All rates of the weights that the engine holds.

    Args:
        rollout: with the weights to measure.
        problems: held-out ones.
        fixed: the starting model's sampled failures on them; None: these weights are the starting model's.

    Returns:
        The rates, and these weights' own sampled failures.
    """
    own: dict[str, list[Failure]] = {}
    scores: Scores = {"first_try": {}, "retry_success_fixed": {}, "within_two": {}}
    for mode, greedy in (("sampled", False), ("greedy", True)):
        attempts = rollout.first_attempts(problems, EVALUATION_STEP, greedy=greedy)
        passed = sum(attempt.passed for attempt in attempts)
        own[mode] = failures_of(attempts)
        rescued = _retried(rollout, own[mode], greedy)
        given = own["sampled"] if fixed is None else fixed
        if given is own[mode]:
            scores["retry_success_fixed"][mode] = rate(rescued, len(given))
        else:
            scores["retry_success_fixed"][mode] = rate(_retried(rollout, given, greedy), len(given))
        scores["first_try"][mode] = rate(passed, len(problems))
        scores["within_two"][mode] = rate(passed + rescued, len(problems))
    return scores, own["sampled"]


def _retried(rollout: Rollout, failures: Sequence[Failure], greedy: bool) -> int:
    groups = rollout.reflect_and_retry(failures, EVALUATION_STEP, group_size=1, greedy=greedy)
    return sum(int(group.reflections[0].reward) for group in groups)


def as_json(scores: Scores) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores for summary.json; a rate of no problems has the value None."""
    return {
        name: {mode: asdict(value) | ({} if value.n else {"value": None}) for mode, value in modes.items()}
        for name, modes in scores.items()
    }
