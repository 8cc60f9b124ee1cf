"""Which dialogues are shown."""

from __future__ import annotations

from dataclasses import replace

from nemo_r3.html_report.rollouts import GROUPS, REFLECTIONS, Written, WrittenGroup, WrittenStep, spaced


def group(number: int, *rewards: int) -> WrittenGroup:
    written = [
        Written(f"{place}", "", bool(reward), reward - place / 1000, False, False, False)
        for place, reward in enumerate(rewards)
    ]
    return WrittenGroup(number, "id", "problem", "attempt", written)


def test_steps_are_spaced_with_both_ends() -> None:
    assert spaced(list(range(1, 1001)), 4) == [1, 334, 667, 1000]
    assert spaced([3, 5], 4) == [3, 5] and spaced([], 4) == []


def test_mixed_groups_are_shown_first_but_not_alone() -> None:
    mixed, failed = [group(number, 0, 1) for number in range(0, 20, 2)], [group(n, 0, 0) for n in range(1, 20, 2)]
    assert [it.number for it in WrittenStep(1, mixed + failed).shown] == [0, 1, 2, 3, 4, 6]
    assert len(WrittenStep(1, mixed[:1] + failed).shown) == GROUPS
    assert len(WrittenStep(1, mixed).shown) == GROUPS


def test_a_group_whose_retries_all_pass_teaches_where_some_earn_nothing() -> None:
    """With algo.reward_leaks=false; and one whose only passing retries follow leaks does not."""
    reflections = group(0, 1, 1).reflections
    leak = replace(reflections[1], advantage=-0.7, solves=True)
    assert replace(group(0, 1, 1), reflections=[replace(reflections[0], advantage=0.7), leak]).is_mixed
    assert not replace(group(0, 1, 0), reflections=[replace(leak, advantage=0.0), *group(0, 0).reflections]).is_mixed


def test_the_best_are_the_highest_advantages_of_any_group() -> None:
    best = WrittenStep(1, [group(0, 0, 1, 1), group(1, 1, 0), group(2, 0, 0), group(3, 0, 0, 1)]).best
    assert [(group.number, it.reflection) for group, it in best] == [(1, "0"), (0, "1"), (3, "2")]


def test_a_large_group_shows_both_ends() -> None:
    large = group(0, *[0] * 30, *[1] * 2)
    assert [it.reflection for it in large.shown][:3] == ["30", "31", "0"]
    assert len(large.shown) == REFLECTIONS and large.shown[-1].reflection == "29"
    assert large.best.reflection == "30"
