"""Group advantages against hand-computed numbers, and the shuffled-reward control."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_r3.algo.advantages import Advantage, group_advantages, is_mixed, shuffled

REWARDS = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=16)


def test_one_pass_in_four_by_hand() -> None:
    # mean 1/4; sample standard deviation sqrt((9 + 1 + 1 + 1) / 16 / 3) = 1/2
    scale = 0.5 + 1e-4
    assert group_advantages([1, 0, 0, 0], Advantage.STD) == pytest.approx(
        [0.75 / scale, *[-0.25 / scale] * 3], rel=1e-12
    )
    assert group_advantages([1, 0, 0, 0], Advantage.CENTRED) == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages([1, 0, 0, 0], Advantage.LEAVE_ONE_OUT) == [1.0, *[-1 / 3] * 3]


def test_equal_rewards_have_no_advantage() -> None:
    for kind in Advantage:
        assert group_advantages([1.0] * 8, kind) == [0.0] * 8
    assert not is_mixed([1.0] * 8) and not is_mixed([0.0, 0.0])
    assert is_mixed([0.0, 1.0, 0.0])


@given(REWARDS, st.sampled_from(Advantage))
def test_advantages_sum_to_zero_and_keep_the_order_of_rewards(rewards: list[float], kind: Advantage) -> None:
    advantages = group_advantages(rewards, kind)
    assert sum(advantages) == pytest.approx(0, abs=1e-9)
    if is_mixed(rewards):
        assert all((advantage > 0) == (reward == 1) for advantage, reward in zip(advantages, rewards, strict=True))


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_leave_one_out_is_the_distance_to_the_mean_of_the_others(rewards: list[float]) -> None:
    for i, advantage in enumerate(group_advantages(rewards, Advantage.LEAVE_ONE_OUT)):
        others = rewards[:i] + rewards[i + 1 :]
        assert advantage == pytest.approx(rewards[i] - sum(others) / len(others), abs=1e-9)


@given(st.lists(REWARDS, min_size=1, max_size=6), st.integers(0, 2**31))
def test_shuffled_rewards_are_a_permutation_of_each_group(rewards: list[list[float]], seed: int) -> None:
    dealt = shuffled(rewards, seed)
    assert [sorted(group) for group in dealt] == [sorted(group) for group in rewards]
    assert dealt == shuffled(rewards, seed)


def test_shuffling_follows_the_seed_and_differs_from_group_to_group() -> None:
    rewards = [[1.0] * 4 + [0.0] * 4] * 2
    deals = [shuffled(rewards, seed) for seed in range(20)]
    assert len({str(deal) for deal in deals}) > 15
    assert sum(first != second for first, second in deals) > 15
    assert rewards == [[1.0] * 4 + [0.0] * 4] * 2, "the argument is left alone"
