from __future__ import annotations

import pytest

from nemo_r3.rollout.placement import deal


@pytest.mark.parametrize("hands", [1, 2, 3, 7])
@pytest.mark.parametrize("costs", [[], [4], [5, 1, 1, 3], [2] * 11, list(range(20))])
def test_everything_is_dealt_once_and_in_order(costs: list[int], hands: int) -> None:
    dealt = deal(costs, hands)
    assert len(dealt) == hands
    assert sorted(item for hand in dealt for item in hand) == list(range(len(costs)))
    assert all(hand == sorted(hand) for hand in dealt)


def test_costs_are_balanced() -> None:
    assert deal([5, 1, 1, 3], 2) == [[0], [1, 2, 3]]
    loads = [2 * len(hand) for hand in deal([2] * 11, 3)]
    assert max(loads) - min(loads) <= 2
