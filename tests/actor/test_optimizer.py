"""The learning rate; AdamW itself is in test_policy.py."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_r3.actor.optimizer import build_schedule, restore_schedule, schedule_state
from nemo_r3.actor.trainer import Trainer
from nemo_r3.config import ActorConfig, Config


def schedule_of(steps: int, lr_min: float = 0.0) -> Any:
    config = Config()
    config.train.steps, config.actor.lr, config.actor.lr_min, config.actor.lr_warmup_ratio = steps, 1e-3, lr_min, 0.5
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


@pytest.mark.parametrize(("done", "lr_min"), [(0, 0.0), (5, 0.0), (9, 0.0), (5, 1e-5)])
def test_the_steps_left_are_those_whose_learning_rate_is_not_0(done: int, lr_min: float) -> None:
    schedule = schedule_of(8, lr_min)
    rates(schedule, done)
    trainer: Any = SimpleNamespace(
        schedule=schedule, policy=SimpleNamespace(config=Config(actor=ActorConfig(lr_min=lr_min)))
    )
    left = Trainer.steps_left(trainer)
    assert sum(rate > 0 for rate in rates(schedule, 20)) == min(left, 20)
    assert (left == math.inf) == (lr_min > 0)


def test_a_run_that_is_resumed_with_more_steps_keeps_its_learning_rates() -> None:
    whole, stopped, longer = schedule_of(8), schedule_of(8), schedule_of(40)
    expected = rates(whole, 8)
    rates(stopped, 2)
    restore_schedule(longer, schedule_state(stopped))
    assert rates(longer, 6) == expected[2:]
