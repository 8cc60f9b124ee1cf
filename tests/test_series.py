"""A metric over a run's steps, some of which lack it."""

import math

from nemo_r3.series import column, ends_of, moving_mean


def test_what_is_no_number_is_nan() -> None:
    known, *others = column([{"kl": 1}, {}, {"kl": None}, {"kl": "1.5"}], "kl")
    assert known == 1.0 and all(map(math.isnan, others)) and len(others) == 3


def test_moving_mean() -> None:
    means = moving_mean([1.0, math.nan, 0.0, 0.5, math.nan, math.nan, math.nan], 3)
    assert means[:6] == [1.0, 1.0, 0.5, 0.25, 0.25, 0.5]
    assert math.isnan(means[6])


def test_the_ends_of_a_run_do_not_meet() -> None:
    assert [ends_of(steps) for steps in (0, 1, 2, 9, 10, 100)] == [0, 0, 1, 4, 5, 5]
