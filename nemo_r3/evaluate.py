"""What training changed on held-out problems: first try, second try after a failure, and within two tries.

Retry success is measured on the starting model's failures, both before and after: on the model's current failures it
would fall as the model improves, because only hard problems remain failures. Every verdict before has one after, on the
same problem, so differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_r3.rollout.scheduler import Rollout
from nemo_r3.types import Attempt, Group, Problem, Reflection

EVALUATION_STEP = -1
"""The step in the seeds of evaluation requests; no training step has it, so evaluating never changes a run."""
RESAMPLING_STEP = -2
"""The step in the seeds of second, independent first answers."""
DONOR_STEP = -3
"""The step in the seeds of retries after another failure's reflection."""
REREADING_STEP = -4
"""The step in the seeds of retries after the starting model's reflections."""
Z95 = 1.959964


Rate = dict[str, Any]
"""As summary.json has it: a share of successes or the difference of two ("value", None of no problems), the ends of its
95 % interval ("low", "high") and how many distinct problems there are ("n")."""
Scores = dict[str, dict[str, Rate]]
"""A name of `Verdicts` -> sampled | greedy -> Rate."""
Verdicts = dict[str, dict[str, list[bool]]]
"""What was measured -> sampled | greedy -> a verdict for each problem, or each of the starting model's failures.

- first_try: the first answer passes.
- within_two: the first answer passes, or the retry after a reflection on it.
- within_two_resampled (sampled only): the first answer passes, or a second, independent one: the baseline for retries.
- retry_success_fixed: the retry passes, on the starting model's sampled failures.
- retry_success_donor (sampled only): on the same failures, a retry passes that sees the reflection on the next failure
  instead (the last one that on the first): the baseline for its content. Empty if there is no other failure.
- retry_success_reread (sampled only): on the same failures, a retry passes that sees the starting model's reflection.
  What training changed here is reading; what is left of its gain is writing.
- reflection_solves: the text of that retry's reflection passes, so it gives the answer away (not every leak does).
- attempts_truncated, reflections_truncated, retries_truncated: the turn was cut at its token limit.
"""
ADDS = {
    "reflection_adds": ("within_two_resampled", "within_two"),
    "content_adds": ("retry_success_donor", "retry_success_fixed"),
    "writing_adds": ("retry_success_reread", "retry_success_fixed"),
}
"""A score -> the two verdicts that it is the difference of: a control, and what is measured against it."""


def rate(passed: int, n: int) -> Rate:
    """The success rate of `passed` out of `n` with its Wilson score interval (Wilson 1927)."""
    if n == 0:
        return {"value": None, "low": 0.0, "high": 1.0, "n": 0}
    share, z2 = passed / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return {"value": round(share, 4), "low": round(low, 4), "high": round(high, 4), "n": n}


def difference(before: Sequence[bool], after: Sequence[bool]) -> Rate:
    """The share after minus the share before, on the same problems, with the Wald interval for matched pairs.

    Only problems whose verdict changed matter (McNemar 1947; the interval is method 1 of Newcombe 1998, Statistics in
    Medicine 17, 2635). With few of those, say under ten, it is too narrow.
    """
    n = len(before)
    if n == 0:
        return {"value": None, "low": -1.0, "high": 1.0, "n": 0}
    gained = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    value = (gained - lost) / n
    half = Z95 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    low, high = max(-1.0, value - half), min(1.0, value + half)
    return {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4), "n": n}


def measure(
    rollout: Rollout, problems: Sequence[Problem], fixed: Sequence[Group] | None = None
) -> tuple[Verdicts, Sequence[Group]]:
    """All verdicts on the weights that the engine holds, and their reflections on the starting model's failures.

    `fixed` are that model's own sampled ones, on the same problems; None if these weights are the starting model's.
    """
    attempts, own = _two_tries(rollout, problems, greedy=False)
    retried = own if fixed is None else _reflected(rollout, [group.failure for group in fixed], greedy=False)
    sampled = _verdicts(attempts, own, retried) | _controls(rollout, attempts, own, retried, fixed)
    attempts, greedy_own = _two_tries(rollout, problems, greedy=True)
    greedy = _verdicts(attempts, greedy_own, _reflected(rollout, [group.failure for group in retried], greedy=True))
    modes = {"sampled": sampled, "greedy": greedy}
    return {name: {mode: found[name] for mode, found in modes.items() if name in found} for name in sampled}, retried


def measure_while_training(
    rollout: Rollout, problems: Sequence[Problem], fixed: Sequence[Attempt]
) -> dict[str, float | None]:
    """Three rates of the weights that the engine holds, the same that `measure` finds for sampled answers.

    They are first_try, within_two, and as second_try its retry_success_fixed, on the starting model's failures `fixed`;
    None of no failures.
    """
    attempts, own = _two_tries(rollout, problems, greedy=False)
    verdicts = _verdicts(attempts, own, _reflected(rollout, fixed, greedy=False))
    names = {"first_try": "first_try", "second_try": "retry_success_fixed", "within_two": "within_two"}
    return {name: rate(sum(verdicts[of]), len(verdicts[of]))["value"] for name, of in names.items()}


def _two_tries(rollout: Rollout, problems: Sequence[Problem], greedy: bool) -> tuple[list[Attempt], list[Group]]:
    """First answers, and a reflection with its retry on each failure among them."""
    attempts = rollout.first_attempts(problems, EVALUATION_STEP, greedy=greedy)
    return attempts, _reflected(rollout, [attempt for attempt in attempts if attempt.is_failure], greedy)


def _reflected(rollout: Rollout, failures: Sequence[Attempt], greedy: bool) -> list[Group]:
    return rollout.reflect_and_retry(failures, EVALUATION_STEP, group_size=1, greedy=greedy)


def _verdicts(attempts: Sequence[Attempt], own: Sequence[Group], retried: Sequence[Group]) -> dict[str, list[bool]]:
    """What is measured of sampled and of greedy answers; `retried` are the starting model's failures."""
    reflections = _only(retried)
    return {
        "first_try": [attempt.passed for attempt in attempts],
        "retry_success_fixed": _passed(reflections),
        "within_two": _within_two(attempts, _passed(_only(own))),
        "reflection_solves": [reflection.solves for reflection in reflections],
        "attempts_truncated": [attempt.answer.truncated for attempt in attempts],
        "reflections_truncated": [reflection.answer.truncated for reflection in reflections],
        "retries_truncated": [reflection.retry.truncated for reflection in reflections],
    }


def _controls(
    rollout: Rollout,
    attempts: Sequence[Attempt],
    own: Sequence[Group],
    retried: Sequence[Group],
    fixed: Sequence[Group] | None,
) -> dict[str, list[bool]]:
    """What the sampled verdicts are measured against."""
    failures, reread = [group.failure for group in retried], _only(retried)
    again = rollout.first_attempts([group.failure.problem for group in own], RESAMPLING_STEP)
    donated = _after_donors(rollout, failures, reread)
    if fixed is not None:
        old = [reflection.answer for reflection in _only(fixed)]
        reread = rollout.retry_after(failures, old, REREADING_STEP)
    return {
        "within_two_resampled": _within_two(attempts, [attempt.passed for attempt in again]),
        "retry_success_donor": _passed(donated),
        "retry_success_reread": _passed(reread),
    }


def _only(groups: Sequence[Group]) -> list[Reflection]:
    """The reflections of groups that have one each."""
    return [group.reflections[0] for group in groups]


def _after_donors(rollout: Rollout, failures: Sequence[Attempt], reflections: Sequence[Reflection]) -> list[Reflection]:
    """A retry on each failure after the reflection on the next one; none if there is no other."""
    if len(failures) < 2:
        return []
    donors = [reflection.answer for reflection in (*reflections[1:], reflections[0])]
    return rollout.retry_after(failures, donors, DONOR_STEP)


def _passed(reflections: Sequence[Reflection]) -> list[bool]:
    return [reflection.passed for reflection in reflections]


def _within_two(attempts: Sequence[Attempt], seconds: Sequence[bool]) -> list[bool]:
    """Whether each attempt passed or, if it is a failure, its second try did."""
    second = iter(seconds)
    return [attempt.passed or (attempt.is_failure and next(second)) for attempt in attempts]


def scores(verdicts: Verdicts) -> Scores:
    """The rate of each list of verdicts, and what each of `ADDS` adds to its control."""
    rates = {
        name: {mode: rate(sum(values), len(values)) for mode, values in modes.items()}
        for name, modes in verdicts.items()
    }
    adds = {
        name: {"sampled": difference(verdicts[control]["sampled"], verdicts[measured]["sampled"])}
        for name, (control, measured) in ADDS.items()
    }
    return rates | adds


def differences(before: Verdicts, after: Verdicts) -> Scores:
    """What training changed in each list of verdicts."""
    return {
        name: {mode: difference(values, after[name][mode]) for mode, values in modes.items()}
        for name, modes in before.items()
    }


def numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """The values in summary.json's scores, as "before/first_try/sampled", without those of no problems."""
    return {
        f"{part}/{name}/{mode}": entry["value"]
        for part in ("before", "after", "difference")
        for name, modes in summary.get(part, {}).items()
        for mode, entry in modes.items()
        if entry["value"] is not None
    }
