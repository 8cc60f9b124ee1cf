"""What of the metrics is pointed at."""

from __future__ import annotations

import math

from nemo_r3.config import TrainConfig
from nemo_r3.html_report.health import marked_steps, phases, shares, speeds

METRICS = [
    {"step": 1, "loss": 0.1, "token_mult_prob_error": 1.0, "skipped": 0.0, "truncated": 0.0, "time/update": 1.0}
    | {"contradictions": 2},
    {"step": 2, "loss": None, "token_mult_prob_error": None, "truncated": 0.5, "time/update": 3, "time/cpu_update": 9},
    {"step": 4, "loss": 0.1, "token_mult_prob_error": 1.2, "skipped": 1.0, "truncated": 0.1, "time/rollout": 4.0},
]


def test_marked_steps() -> None:
    found = [(it.count, it.steps) for it in marked_steps(METRICS, TrainConfig())]
    assert found == [(1, "4"), (1, "4"), (1, "1"), (1, "2"), (1, "3")]
    many = marked_steps([{"step": step, "loss": None} for step in range(1, 31)], TrainConfig())
    assert many[3].count == 30 and many[3].steps.endswith("11, 12, ...")
    assert [it.count for it in marked_steps([], TrainConfig())] == [0, 0, 0, 0, 0]


def test_an_update_of_nan_is_not_nothing_to_train_on() -> None:
    """metrics.jsonl has null for NaN, too."""
    nan = {"step": 1, "loss": None, "grad_norm": None, "token_mult_prob_error": None, "skipped": 1.0}
    assert [it.count for it in marked_steps([nan], TrainConfig())] == [1, 1, 0, 0, 0]


def test_shares() -> None:
    (cut,) = shares(METRICS)
    assert (cut.what, cut.highest, cut.at) == ("reflections cut at their limit", 0.5, 2)
    assert (cut.first, cut.last) == (0.0, 0.1)
    (cut,) = shares([{"step": step, "truncated": step / 10} for step in range(1, 9)])
    assert math.isclose(cut.first, 0.25) and math.isclose(cut.last, 0.65)


def test_phases() -> None:
    update, rollout, evaluate = phases(METRICS, {"seconds": {"update": {"wall": 9.0}, "evaluate": {"wall": 7.0}}})
    assert (update.seconds, update.share, rollout.seconds, evaluate.seconds) == (4.0, 0.5, 4.0, 7.0)
    assert math.isclose(update.per_step, 4 / 3) and math.isnan(evaluate.share)
    assert phases([], {}) == []
    for damaged in (None, 5, ["mine"], {"mine": 5, "evaluate": None}):
        assert phases([], {"seconds": damaged}) == []
    (mine,) = phases([], {"seconds": {"mine": {"wall": "long"}}})
    assert math.isnan(mine.seconds)


def test_speeds() -> None:
    assert speeds([{"speed/rollout_tokens": value} for value in (1.0, 5.0, 2.0)]) == {
        "tokens sampled per second, all ranks": 2.0
    }
