"""Which of a run's dialogues are shown: of some steps, of some groups, the best and the worst reflections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_r3.files import json_lines
from nemo_r3.series import number

STEPS = 10
GROUPS = 6
EQUAL_GROUPS = 2
"""So many of a step's groups are shown, and so many of these have only passing or only failing retries."""
REFLECTIONS = 16
COMPARED = 3


@dataclass(frozen=True)
class Written:
    """One reflection and its retry, as rollouts/ has them, and whether they were cut at their limits."""

    reflection: str
    retry: str
    passed: bool
    advantage: float
    cut: bool
    retry_cut: bool
    solves: bool

    @property
    def tags(self) -> set[str]:
        """What the page's filter selects by."""
        tags = {"passed" if self.passed else "failed"}
        return tags | ({"cut"} if self.cut or self.retry_cut else set()) | ({"solves"} if self.solves else set())


@dataclass(frozen=True)
class WrittenGroup:
    """A failure and its reflections in the order of sampling; texts are empty where they were lost."""

    number: int
    problem_id: str
    problem: str
    attempt: str
    reflections: list[Written]

    @property
    def passed(self) -> int:
        """How many retries pass."""
        return sum(it.passed for it in self.reflections)

    @property
    def is_mixed(self) -> bool:
        """Whether its rewards differ, so that some are above their mean: only then does the group teach."""
        return any(it.advantage > 0 for it in self.reflections)

    @property
    def best(self) -> Written:
        """The reflection with the highest advantage."""
        return max(self.reflections, key=lambda it: it.advantage)

    @property
    def shown(self) -> list[Written]:
        """The highest advantages first: all of a small group, the highest and the lowest of a large one."""
        ordered = sorted(self.reflections, key=lambda it: -it.advantage)
        if len(ordered) <= REFLECTIONS:
            return ordered
        return ordered[: REFLECTIONS // 2] + ordered[-REFLECTIONS // 2 :]

    @property
    def tags(self) -> set[str]:
        """The tags of the reflections that are shown."""
        return {tag for it in self.shown for tag in it.tags}


@dataclass(frozen=True)
class WrittenStep:
    """A step's groups."""

    step: int
    groups: list[WrittenGroup]

    @property
    def shown(self) -> list[WrittenGroup]:
        """At most GROUPS of them: mixed ones, and EQUAL_GROUPS or what is left of others."""
        mixed = [group for group in self.groups if group.is_mixed]
        equal = [group for group in self.groups if not group.is_mixed][: max(EQUAL_GROUPS, GROUPS - len(mixed))]
        return sorted(mixed[: GROUPS - len(equal)] + equal, key=lambda group: group.number)

    @property
    def best(self) -> list[tuple[WrittenGroup, Written]]:
        """The reflections with the highest advantages, each of another group."""
        tops = sorted(self.groups, key=lambda group: -group.best.advantage)
        return [(group, group.best) for group in tops[:COMPARED]]

    @property
    def first(self) -> list[tuple[WrittenGroup, Written]]:
        """The first reflections of the first groups: a sample that nobody chose."""
        return [(group, group.reflections[0]) for group in self.groups[:COMPARED]]


def read_steps(rollouts: dict[int, Path], unread: list[str]) -> list[WrittenStep]:
    """The steps to show: the first, the last and some evenly spaced ones between."""
    steps = [WrittenStep(step, _groups(json_lines(rollouts[step], unread))) for step in spaced(list(rollouts), STEPS)]
    return [step for step in steps if step.groups]


def read_evaluation(file: Path, unread: list[str]) -> list[WrittenStep]:
    """What an evaluation sampled: of the starting model, which is step 0, and of the trained one."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for line in json_lines(file, unread):
        if isinstance(line.get("step"), int):
            by_step.setdefault(line["step"], []).append(line)
    return [WrittenStep(step, groups) for step, lines in sorted(by_step.items()) if (groups := _groups(lines))]


def spaced(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of the values, evenly spaced, with the first and the last."""
    last = len(values) - 1
    if last < count:
        return list(values)
    return [values[round(place * last / (count - 1))] for place in range(count)]


def _groups(lines: Sequence[dict[str, Any]]) -> list[WrittenGroup]:
    by_number: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        if isinstance(line.get("group"), int) and isinstance(line.get("reflection"), str):
            by_number.setdefault(line["group"], []).append(line)
    return [_group(place, own) for place, own in sorted(by_number.items())]


def _group(place: int, lines: list[dict[str, Any]]) -> WrittenGroup:
    shared = next((line for line in lines if "problem" in line), {})
    written = [
        Written(
            reflection=line["reflection"],
            retry=str(line.get("retry", "")),
            passed=line.get("retry_passed") is True,
            advantage=number(line, "advantage"),
            cut=line.get("finish_reason") == "length",
            retry_cut=line.get("retry_finish_reason") == "length",
            solves=line.get("reflection_solves") is True,
        )
        for line in lines
    ]
    return WrittenGroup(
        number=place,
        problem_id=str(lines[0].get("problem_id", "")),
        problem=str(shared.get("problem", "")),
        attempt=str(shared.get("attempt", "")),
        reflections=written,
    )
