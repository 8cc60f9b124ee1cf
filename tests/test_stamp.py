"""What makes a failure bank another one, and how that is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemo_r3.failures.stamp import Stamp, differences, hash_of
from nemo_r3.types import Problem

STAMP = Stamp("m0", "p0", "countdown", "v1", "d0", 1.0, 24, 2)


@pytest.mark.parametrize(
    "changed", [{"id": "p9"}, {"text": "other words"}, {"data": {"numbers": [1], "target": 2}}, {"tools": ({"x": 1},)}]
)
def test_a_problem_that_was_changed_is_another_one_to_the_stamp(changed: dict[str, object]) -> None:
    asked = [Problem(f"p{i}", f"problem {i}", {"numbers": [i], "target": i}) for i in range(2)]
    assert hash_of(asked) == hash_of([*asked]) != hash_of(asked[::-1])
    assert hash_of([asked[0], replace(asked[1], **changed)]) != hash_of(asked)


def test_the_settings_behind_a_difference_are_named() -> None:
    other = replace(STAMP, problems="p1", task="mine", temperature=0.5)
    assert differences(vars(STAMP), vars(other)) == [
        "problems 'p0' != 'p1' (failures.problems, task.options or the task's data; or problems() varies)",
        "task 'countdown' != 'mine'",
        "temperature 1.0 != 0.5 (rollout.temperature)",
    ]


def test_a_users_file_that_has_changed_is_named() -> None:
    def said(found: str) -> list[str]:
        return differences(vars(replace(STAMP, verifier=found)), vars(replace(STAMP, verifier="my.lucky a1 b1 2")))

    assert said("my.lucky a1 b1 2") == []
    assert said("my.lucky a0 b0 2") == ["verifier (my/lucky.py or a file beside it that it imports has changed since)"]
    assert said("my.lucky a1 b0 2") == ["verifier (task.options have changed since)"]
    assert said("my.lucky a1 b1 1") == ["verifier (nemo_r3.tasks has changed since)"]
    assert said("my.other a1 b1 2") == ["verifier 'my.other a1 b1 2' != 'my.lucky a1 b1 2'"]
    assert said("countdown-1 x y") == ["verifier 'countdown-1 x y' != 'my.lucky a1 b1 2'"]
