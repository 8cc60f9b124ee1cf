"""The learning rate; AdamW itself is in test_policy.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nemo_r3.actor.optimizer import build_schedule, restore_schedule, schedule_state
from nemo_r3.config import Config


def schedule_of(steps: int) -> Any:
    config = Config()
    config.train.steps, config.actor.lr, config.actor.lr_warmup_ratio = steps, 1e-3, 0.5
    return build_schedule(SimpleNamespace(param_groups=[{}]), config)  # type: ignore[arg-type]


def rates(schedule: Any, count: int) -> list[float]:
    found = []
    for _ in range(count):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.step(increment=1)
    return found


def test_the_first_steps_warm_up_and_none_is_at_zero() -> None:
    assert rates(schedule_of(8), 6) == pytest.approx([2.5e-4, 4.375e-4, 6.25e-4, 8.125e-4, 1e-3, 8.5355e-4], rel=1e-4)
    assert rates(schedule_of(1), 1) == [1e-3]


@pytest.mark.parametrize("done", [0, 5, 9])
def test_the_steps_left_by_a_saved_schedule_are_those_whose_learning_rate_is_not_0(done: int) -> None:
    schedule = schedule_of(8)
    rates(schedule, done)
    state = schedule_state(schedule)
    left = max(state["lr_decay_steps"] - state["num_steps"], 0)  # as recipes.checkpoints counts them
    assert sum(rate > 0 for rate in rates(schedule, 20)) == left


def test_a_run_that_is_resumed_with_more_steps_keeps_its_learning_rates() -> None:
    whole, stopped, longer = schedule_of(8), schedule_of(8), schedule_of(40)
    expected = rates(whole, 8)
    rates(stopped, 2)
    restore_schedule(longer, schedule_state(stopped))
    assert rates(longer, 6) == expected[2:]
